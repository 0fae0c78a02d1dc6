// y = x W^T + bias for 1 to 128 tokens, at the speed of reading W.
//
// Blocks take equal shares, in bytes, of the stream of W's tiles. One warp keeps a ring of tiles filled through the copy
// engine; two groups of four warps multiply them by wgmma, W's rows along M and tokens along N:
//
//                 columns of W ->                              ring in shared memory
//     rows 0-127    | 0 0 0 0 0 0 1 1 1 1 1 1 |        +--------+--------+--------+--------+
//     rows 128-255  | 1 2 2 2 2 2 2 3 3 3 3 3 |        | tile,x | tile,x | tile,x | tile,x | <- copy engine
//     (the number is the block that takes the tile)    +--------+--------+--------+--------+ -> tensor cores
//
// A "unit" is ROWS tiles under one another and the 64 columns of x that they need. Blocks that share rows of tiles leave
// partial sums in float32; the last to arrive adds them up, always in the same order, so that results repeat bit for
// bit, and sets the counter of arrivals back to zero.

#include "hopper.cuh"

constexpr int GROUPS = 2, CONSUMERS = 128 * GROUPS, THREADS = CONSUMERS + 32;
constexpr int HEADER = 2;  // of a block's line in the schedule: first unit, end; then its descriptors

struct Task {
    const uint8_t* payload;
    const int* schedule;  // [blocks + 1, line]; see schedule.py
    const void* bias;     // [out] or null
    void* y;              // [tokens, out]
    float4* partial_sums;  // [2 blocks, tokens per wgmma * ROWS / 4, CONSUMERS]
    int* arrivals;         // [rows of units], zero before and after
    int line, columns, out_features, tokens;
};

template <int N, int ROWS>
struct Stage {
    static constexpr uint32_t TILES = ROWS * DENSE_BYTES, BYTES = TILES + N * TILE_COLUMNS * 2;
};

template <int ROWS, int STAGES>
struct Control {
    uint64_t full[STAGES], empty[STAGES];  // mbarriers
    volatile uint32_t kinds[STAGES][ROWS];  // descriptors of the tiles in the ring
    volatile int last;
};

template <typename T, int N, int ROWS, int STAGES>
__device__ void load(const Task& task, const CUtensorMap& x, uint32_t ring, uint32_t full, uint32_t empty,
                     volatile uint32_t (*kinds)[ROWS]) {
    const int lane = threadIdx.x % 32;
    const int* line = task.schedule + size_t(blockIdx.x) * task.line;
    const int first = line[0], units = line[1] - first;
    constexpr int BATCH = 32 / ROWS;  // units whose descriptors the warp holds, one per lane
    const auto batch = [&](int from) {
        const int place = from * ROWS + lane;
        return place < units * ROWS ? line[HEADER + place] : 0;
    };
    uint32_t held = batch(0), next = batch(BATCH);

    const auto load_tiles = [&](int unit) {
        const int stage = unit % STAGES;
        uint32_t descriptors[ROWS], bytes = 0;
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            descriptors[row] = __shfl_sync(~0u, held, unit % BATCH * ROWS + row);
            bytes += tile_bytes(descriptors[row]);
        }
        if (lane) return;
#pragma unroll
        for (int row = 0; row < ROWS; ++row) kinds[stage][row] = descriptors[row];
        barrier_arrive_expect(full + 8 * stage, bytes + N * TILE_COLUMNS * 2);
#pragma unroll
        for (int row = 0; row < ROWS; ++row)
            if (descriptors[row] != NO_TILE)
                copy_bytes(ring + stage * Stage<N, ROWS>::BYTES + row * DENSE_BYTES,
                           tile_address(task.payload, descriptors[row]), tile_bytes(descriptors[row]),
                           full + 8 * stage, EVICT_FIRST);
    };
    const auto load_x = [&](int unit) {
        const int stage = unit % STAGES;
        if (!lane)
            copy_box(ring + stage * Stage<N, ROWS>::BYTES + Stage<N, ROWS>::TILES, x,
                     (first + unit) % task.columns * TILE_COLUMNS, 0, full + 8 * stage);
    };

    static_assert(STAGES <= BATCH);
    const int ahead = units < STAGES ? units : STAGES;
    for (int unit = 0; unit < ahead; ++unit) load_tiles(unit);
    wait_for_previous_kernel();  // it may still be writing x; W it does not touch
    for (int unit = 0; unit < ahead; ++unit) load_x(unit);
    for (int unit = STAGES; unit < units; ++unit) {
        if (unit % BATCH == 0) {
            held = next;
            next = batch(unit + BATCH);
        }
        barrier_wait(empty + 8 * (unit % STAGES), (unit / STAGES - 1) & 1);
        load_tiles(unit);
        load_x(unit);
    }
}

// d[ROWS][N / 2] += the unit in the ring. With one row of tiles, each group of warps takes half of its 128 rows, else it
// takes every other row of tiles as two halves.
template <typename T, int N, int ROWS>
__device__ inline void multiply(float (&d)[ROWS][N / 2], uint32_t stage, const volatile uint32_t* kinds, int group) {
    const uint64_t b = operand_of_128_byte_rows(stage + Stage<N, ROWS>::TILES);
    const int row_of_tiles = ROWS == 1 ? 0 : group;
    const uint32_t tile = stage + row_of_tiles * DENSE_BYTES, kind = kinds[row_of_tiles];
    if (kind & SPARSE_BIT) {
        uint32_t metadata[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) metadata[i] = metadata_of(tile, ROWS == 1 ? 64 * group : 64 * i);
        wgmma_begin();
#pragma unroll
        for (int i = 0; i < ROWS; ++i) multiply_sparse<T, N>(d[i], tile, ROWS == 1 ? 64 * group : 64 * i, b, metadata[i]);
        wgmma_commit();
        wgmma_wait();
    } else if (kind != NO_TILE) {
        wgmma_begin();
#pragma unroll
        for (int i = 0; i < ROWS; ++i) multiply_dense<T, N>(d[i], tile, ROWS == 1 ? 64 * group : 64 * i, b);
        wgmma_commit();
        wgmma_wait();
    }
}

// Add up the partial sums of the blocks that share a row of units. False if another block will do it.
template <int N, int ROWS>
__device__ bool reduce(const Task& task, float (&d)[ROWS][N / 2], int row, int units, volatile int* last) {
    constexpr int VECTORS = N / 8;  // of 4 registers
    const int begin = row * task.columns, end = begin + task.columns;
    const auto first_unit = [&](int block) { return task.schedule[size_t(block) * task.line]; };
    // A block shares two rows at most: the one it starts in, and one that it starts.
    const auto sums_of = [&](int block, bool starts_row) {
        return task.partial_sums + (size_t(block) * 2 + starts_row) * ROWS * VECTORS * CONSUMERS + threadIdx.x;
    };
    int block = blockIdx.x;
    float4* own = sums_of(block, first_unit(block) <= begin);
#pragma unroll
    for (int i = 0; i < ROWS * VECTORS; ++i) {
        const float* from = d[i / VECTORS] + i % VECTORS * 4;
        __stcg(own + i * CONSUMERS, make_float4(from[0], from[1], from[2], from[3]));
    }
    named_barrier<CONSUMERS>(1);
    if (threadIdx.x == 0) {
        __threadfence();
        *last = atomicAdd(task.arrivals + row, units) + units == task.columns;
        if (*last) task.arrivals[row] = 0;
        __threadfence();
    }
    named_barrier<CONSUMERS>(1);
    if (!*last) return false;

    while (first_unit(block) > begin) --block;
    const auto add = [&](const float4* sums, float keep) {
#pragma unroll
        for (int i = 0; i < ROWS * VECTORS; ++i) {
            const float4 other = __ldcg(sums + i * CONSUMERS);
            float* to = d[i / VECTORS] + i % VECTORS * 4;
            to[0] = to[0] * keep + other.x, to[1] = to[1] * keep + other.y;
            to[2] = to[2] * keep + other.z, to[3] = to[3] * keep + other.w;
        }
    };
    add(sums_of(block, true), 0);
    for (++block; first_unit(block) < end; ++block) add(sums_of(block, false), 1);
    return true;
}

template <typename T, int N, int ROWS>
__device__ void store(const Task& task, const float (&d)[ROWS][N / 2], int row) {
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    T* y = static_cast<T*>(task.y);
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int below = 0; below < 2; ++below) {
            const int half = ROWS == 1 ? group : 2 * group + i;
            const int out = row * ROWS * TILE_ROWS + 64 * half + 16 * warp + lane / 4 + 8 * below;
            if (out >= task.out_features) continue;
            const float bias = task.bias ? float(static_cast<const T*>(task.bias)[out]) : 0.f;
#pragma unroll
            for (int j = 0; j < N / 8; ++j)
#pragma unroll
                for (int right = 0; right < 2; ++right) {
                    const int token = 8 * j + 2 * (lane % 4) + right;
                    if (token < task.tokens)
                        y[size_t(token) * task.out_features + out] = rounded<T>(d[i][4 * j + 2 * below + right] + bias);
                }
        }
}

template <typename T, int N, int ROWS, int STAGES>
__global__ void __launch_bounds__(THREADS, 1) decode(const __grid_constant__ CUtensorMap x, const Task task) {
    extern __shared__ __align__(1024) uint8_t ring_memory[];
    auto* control = reinterpret_cast<Control<ROWS, STAGES>*>(ring_memory + STAGES * Stage<N, ROWS>::BYTES);
    const uint32_t ring = shared_address(ring_memory);
    const uint32_t full = shared_address(control->full), empty = shared_address(control->empty);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(full + 8 * stage, 1);
            barrier_init(empty + 8 * stage, CONSUMERS / 32);
        }
        barrier_init_fence();
    }
    __syncthreads();
    launch_dependents();

    if (threadIdx.x >= CONSUMERS) {
        load<T, N, ROWS, STAGES>(task, x, ring, full, empty, control->kinds);
        return;
    }
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    const int* line = task.schedule + size_t(blockIdx.x) * task.line;
    const int first = line[0], end = line[1];
    bool waited = false;
    for (int unit = first; unit < end;) {
        const int row = unit / task.columns, start = unit;
        const int row_end = min(end, (row + 1) * task.columns);
        float d[ROWS][N / 2] = {};
        for (; unit < row_end; ++unit) {
            const int stage = (unit - first) % STAGES;
            barrier_wait(full + 8 * stage, (unit - first) / STAGES & 1);
            multiply<T, N, ROWS>(d, ring + stage * Stage<N, ROWS>::BYTES, control->kinds[stage], group);
            __syncwarp();
            if (threadIdx.x % 32 == 0) barrier_arrive(empty + 8 * stage);
        }
        if (!waited) wait_for_previous_kernel();  // it may use the same sums, counters and output
        waited = true;
        if (unit - start == task.columns || reduce<N, ROWS>(task, d, row, unit - start, &control->last))
            store<T, N, ROWS>(task, d, row);
    }
}

struct Launch {
    const void* x;
    int64_t x_stride;
    int in_features, blocks, rows, shared_kib;
    bool overlap;
    cudaStream_t stream;
};

template <typename T, int N, int ROWS, int STAGES>
const char* launch(const Task& task, const Launch& how) {
    CUtensorMap x;
    if (const char* error = describe_matrix<T>(&x, how.x, task.tokens, how.in_features, how.x_stride, N)) return error;
    constexpr int bytes = STAGES * Stage<N, ROWS>::BYTES + sizeof(Control<ROWS, STAGES>);
    auto* kernel = decode<T, N, ROWS, STAGES>;
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return cudaGetErrorString(status);
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = how.blocks;
    config.blockDim = THREADS;
    config.dynamicSmemBytes = bytes;
    config.stream = how.stream;
    config.attrs = &attribute;
    config.numAttrs = how.overlap ? 1 : 0;
    status = cudaLaunchKernelEx(&config, kernel, x, task);
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

template <typename T, int N, int ROWS>
const char* launch_shared(const Task& task, const Launch& how) {
    constexpr int BYTES = Stage<N, ROWS>::BYTES, WHOLE = 226 * 1024 / BYTES, HALF = 112 * 1024 / BYTES;
    if (how.shared_kib > 112) return launch<T, N, ROWS, (WHOLE < 12 ? WHOLE : 12)>(task, how);
    return launch<T, N, ROWS, HALF>(task, how);
}

template <typename T>
const char* launch_type(const Task& task, const Launch& how) {
    const bool one = how.rows == 1;
    if (task.tokens <= 8) return one ? launch_shared<T, 8, 1>(task, how) : launch_shared<T, 8, 2>(task, how);
    if (task.tokens <= 16) return one ? launch_shared<T, 16, 1>(task, how) : launch_shared<T, 16, 2>(task, how);
    if (task.tokens <= 32) return one ? launch_shared<T, 32, 1>(task, how) : launch_shared<T, 32, 2>(task, how);
    if (task.tokens <= 64) return one ? launch_shared<T, 64, 1>(task, how) : launch_shared<T, 64, 2>(task, how);
    return one ? launch_shared<T, 128, 1>(task, how) : "two rows of tiles at a time suit 64 tokens at most";
}

// Null, or what went wrong.
extern "C" const char* patch_decode(int half, const void* x, int64_t x_stride, const void* payload, const void* schedule,
                                    const void* bias, void* y, void* partial_sums, void* arrivals, int line, int blocks,
                                    int rows, int columns, int out_features, int in_features, int tokens,
                                    int shared_kib, int overlap, void* stream) {
    const Task task = {static_cast<const uint8_t*>(payload),
                       static_cast<const int*>(schedule),
                       bias,
                       y,
                       static_cast<float4*>(partial_sums),
                       static_cast<int*>(arrivals),
                       line,
                       columns,
                       out_features,
                       tokens};
    const Launch how = {x, x_stride, in_features, blocks, rows, shared_kib, bool(overlap), cudaStream_t(stream)};
    return half ? launch_type<__half>(task, how) : launch_type<__nv_bfloat16>(task, how);
}
