// y = x W^T + bias for 1 to 128 tokens, at the speed of reading W.
//
// Blocks take equal shares, in bytes, of the stream of W's tiles:
//
//                 columns of W ->
//     rows 0-127    | 0 0 0 0 0 0 1 1 1 1 1 1 |     (the number is the block that takes the tile)
//     rows 128-255  | 1 2 2 2 2 2 2 3 3 3 3 3 |
//
// One warp keeps a ring of tiles filled through the copy engine; two groups of four warps multiply them by wgmma, W's
// rows along M and tokens along N. A block takes no more than half of a multiprocessor's shared memory: the next layer's
// block moves in beside it and has its ring full of tiles by the time that this layer's result is ready.

#include "stream.cuh"

constexpr int THREADS = CONSUMERS + 32, SLOTS = 32;

struct Header {  // of a block's line in the schedule, before the descriptors of its units; see schedule.py
    int first, end;               // units
    int slot[2], from[2], to[2];  // partial sums of the rows of units that it starts in and ends in
};
constexpr int HEADER = sizeof(Header) / sizeof(int);

template <int ROWS>
struct Shared {
    Control<SLOTS, ROWS> control;
    volatile Header header;  // there as soon as the first unit is
};

struct Task {
    const uint8_t* payload;
    const int* schedule;  // [blocks, line]
    const void* bias;     // [out] or null
    void* y;              // [tokens, out]
    Shares shares;
    int line, columns, out_features, tokens;
};

template <typename T, int N, int ROWS, int RING_KIB>
__device__ void load(const Task& task, const CUtensorMap& x, uint32_t ring, Shared<ROWS>* shared) {
    const int lane = threadIdx.x % 32;
    const int* numbers = task.schedule + size_t(blockIdx.x) * task.line;
    // 32 numbers of the line at a time, one per lane
    int held = numbers[lane], following = task.line > 32 ? numbers[32 + lane] : 0;
    const int first = __shfl_sync(~0u, held, 0), units = __shfl_sync(~0u, held, 1) - first;
    if (lane < HEADER) reinterpret_cast<volatile int*>(&shared->header)[lane] = held;
    __syncwarp();
    Filler<RING_KIB, SLOTS, ROWS, N> filler = {task.payload, ring, &shared->control};
    int with_x = 0;
    const auto load_x = [&] {
        for (; with_x < filler.unit; ++with_x) filler.load_x(with_x, x, (first + with_x) % task.columns, 0);
    };
    bool waited = false;
    for (int unit = 0, place = HEADER; unit < units; ++unit, place += ROWS) {
        if (place % 32 == 0) {
            held = following;
            following = place + 32 < task.line ? numbers[place + 32 + lane] : 0;
        }
        uint32_t descriptors[ROWS];
#pragma unroll
        for (int row = 0; row < ROWS; ++row) descriptors[row] = __shfl_sync(~0u, held, place % 32 + row);
        const uint32_t kib = kib_of_tiles(descriptors);
        if (!waited && !filler.has_room(kib)) {
            wait_for_previous_kernel();  // it may still be writing x; W it does not touch
            waited = true;
        }
        if (waited) load_x();
        filler.make_room(kib);
        filler.load_tiles(descriptors, kib, EVICT_FIRST);
    }
    if (!waited) wait_for_previous_kernel();
    load_x();
}

template <typename T, int N, int ROWS>
__device__ void store(const Task& task, const float (&d)[ROWS][N / 2], int row) {
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    T* y = static_cast<T*>(task.y);
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int below = 0; below < 2; ++below) {
            const int out = (row * ROWS + i) * TILE_ROWS + 64 * group + 16 * warp + lane / 4 + 8 * below;
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

template <typename T, int N, int ROWS, int RING_KIB>
__global__ void __launch_bounds__(THREADS, RING_KIB > 112 ? 1 : 2)
    decode(const __grid_constant__ CUtensorMap x, const Task task) {
    extern __shared__ __align__(1024) uint8_t ring_memory[];
    auto* shared = reinterpret_cast<Shared<ROWS>*>(ring_memory + RING_KIB * 1024);
    auto* control = &shared->control;
    const uint32_t ring = shared_address(ring_memory);
    if (threadIdx.x == 0) {
        prefetch_map(x);
        control->init();
    }
    __syncthreads();
    launch_dependents();

    if (threadIdx.x >= CONSUMERS) {
        load<T, N, ROWS, RING_KIB>(task, x, ring, shared);
        return;
    }
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    barrier_wait(shared_address(control->full), 0);
    const volatile Header& header = shared->header;
    int row = header.first / task.columns, column = header.first % task.columns;
    for (int unit = 0; unit < header.end - header.first; ++row, column = 0) {
        const int count = min(task.columns - column, header.end - header.first - unit);
        float d[ROWS][N / 2] = {};
        for (const int end = unit + count; unit < end; ++unit) {
            const int slot = unit % SLOTS;
            barrier_wait(shared_address(control->full + slot), unit / SLOTS & 1);
            multiply<T, N, ROWS>(d, ring, control, slot, group);
            wgmma_wait<0>();
            release(control, slot);
        }
        const bool later = unit > count;  // not in the row that the block starts in
        if (!later) wait_for_previous_kernel();  // it may use the same sums, counters and output
        if (count == task.columns ||
            add_up(d, task.shares, header.slot[later], header.from[later], header.to[later], &control->last))
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

template <typename T, int N, int ROWS, int RING_KIB>
const char* launch(const Task& task, const Launch& how) {
    CUtensorMap x;
    if (const char* error = describe_matrix<T>(&x, how.x, task.tokens, how.in_features, how.x_stride, N)) return error;
    constexpr int bytes = RING_KIB * 1024 + sizeof(Shared<ROWS>);
    auto* kernel = decode<T, N, ROWS, RING_KIB>;
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status == cudaSuccess)  // room for the next layer's block, too
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                      cudaSharedmemCarveoutMaxShared);
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
    return how.shared_kib > 112 ? launch<T, N, ROWS, 225>(task, how) : launch<T, N, ROWS, 111>(task, how);
}

template <typename T>
const char* launch_type(const Task& task, const Launch& how) {
    const bool one = how.rows == 1;
    if (task.tokens <= 8) return one ? launch_shared<T, 8, 1>(task, how) : launch_shared<T, 8, 2>(task, how);
    if (task.tokens <= 16) return one ? launch_shared<T, 16, 1>(task, how) : launch_shared<T, 16, 2>(task, how);
    if (task.tokens <= 32) return one ? launch_shared<T, 32, 1>(task, how) : launch_shared<T, 32, 2>(task, how);
    if (task.tokens <= 64) return one ? launch_shared<T, 64, 1>(task, how) : launch_shared<T, 64, 2>(task, how);
    return one ? launch<T, 128, 1, 225>(task, how) : "two rows of tiles at a time suit 64 tokens at most";
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
                       {static_cast<float4*>(partial_sums), static_cast<int*>(arrivals)},
                       line,
                       columns,
                       out_features,
                       tokens};
    const Launch how = {x, x_stride, in_features, blocks, rows, shared_kib, bool(overlap), cudaStream_t(stream)};
    return half ? launch_type<__half>(task, how) : launch_type<__nv_bfloat16>(task, how);
}
