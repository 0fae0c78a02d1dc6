// y = x W^T + bias for many tokens, at the speed of the tensor cores: wgmma.sp for 2:4 tiles of W, wgmma for dense ones,
// into the same accumulators.
//
// A block makes 256 rows of W times 128 tokens at a time and goes down the columns of W, 64 a step. One warp fills a ring
// of steps, two groups of four warps multiply, each half of every tile. Which blocks make what is decided beforehand
// (schedule.py): most pieces whole, by one block; the last ones may be cut along the columns of W, so that all blocks
// finish together. Results leave through shared memory, transposed to rows of tokens.

#include "stream.cuh"

constexpr int THREADS = CONSUMERS + 128, SLOTS = 8, RING_KIB = 194;
constexpr int OUTPUTS = 256 * 128;    // of a block at a time
constexpr int STORED_TOKENS = 128;  // at a time, by each group: rows of 64 outputs, 128 bytes
constexpr uint32_t STORE_BYTES = STORED_TOKENS * 128;

struct alignas(16) Segment {  // of a block's work; see schedule.py
    int row, token_tile;       // row of units; -1: no more work
    int begin, end;            // columns
    int slot, from, to, none;  // partial sums
};

struct Task {
    const uint8_t* payload;
    const int* descriptors;   // [tile rows, columns]
    const Segment* segments;  // [blocks, most of a block and its end]
    const void* bias;         // [out] or null
    Shares shares;
    int most, tile_rows, columns, out_features, slots;
};

template <int ROWS, int TOKENS, int CLUSTER>
__device__ void load(const Task& task, const CUtensorMap& x, uint32_t ring, Control<SLOTS, ROWS>* control) {
    const int lane = threadIdx.x % 32, rank = CLUSTER == 1 ? 0 : cluster_rank();
    Filler<RING_KIB, SLOTS, ROWS, TOKENS, CLUSTER> filler = {task.payload, ring, control};
    const Segment* segments = task.segments + size_t(blockIdx.x / CLUSTER) * task.most;
    for (Segment segment = *segments, next; segment.row >= 0; segment = next) {
        next = *++segments;
        const auto descriptor = [&](int row, int column) {  // 32 columns at a time, one per lane
            const int tile_row = segment.row * ROWS + row;
            return tile_row < task.tile_rows && column < segment.end
                       ? uint32_t(task.descriptors[size_t(tile_row) * task.columns + column])
                       : NO_TILE;
        };
        uint32_t held[ROWS], following[ROWS];
#pragma unroll
        for (int row = 0; row < ROWS; ++row) following[row] = descriptor(row, segment.begin + lane);
        for (int column = segment.begin; column < segment.end; ++column) {
            const int place = (column - segment.begin) % 32;
            uint32_t descriptors[ROWS];
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                if (place == 0) {
                    held[row] = following[row];
                    following[row] = descriptor(row, column + 32 + lane);
                }
                descriptors[row] = __shfl_sync(~0u, held[row], place);
            }
            const uint32_t kib = kib_of_tiles(descriptors);
            filler.make_room(kib);
            filler.load_tiles(descriptors, kib, EVICT_NORMAL);
            filler.load_x(filler.unit - 1, x, column, (segment.token_tile * CLUSTER + rank) * TOKENS);
        }
    }
}

// Four 8x8 matrices of 16-bit numbers to shared memory, transposed; lane l has the address of row l % 8 of matrix l / 8.
__device__ inline void store_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

template <typename T>
__device__ inline uint32_t rounded_pair(float low, float high) {
    const T pair[] = {rounded<T>(low), rounded<T>(high)};
    uint16_t bits[2];
    memcpy(bits, pair, 4);
    return bits[0] | uint32_t(bits[1]) << 16;
}

// 64 outputs of each of ROWS tiles by TOKENS tokens, to y through this group's shared memory.
template <typename T, int ROWS, int TOKENS>
__device__ void store(const Task& task, const CUtensorMap& y, const float (&d)[ROWS][TOKENS / 2], int row, int token_tile,
                      uint32_t memory, int group) {
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
#pragma unroll
    for (int part = 0; part < ROWS * TOKENS / STORED_TOKENS; ++part) {
        const int tile = part % ROWS, first_token = part / ROWS * STORED_TOKENS;
        const int first_out = (row * ROWS + tile) * TILE_ROWS + 64 * group;
        float bias[2] = {};
#pragma unroll
        for (int below = 0; below < 2; ++below) {
            const int out = first_out + 16 * warp + lane / 4 + 8 * below;
            if (task.bias && out < task.out_features) bias[below] = float(static_cast<const T*>(task.bias)[out]);
        }
        if (thread == 0) stores_have_read();  // those of the part before
        named_barrier<128>(2 + group);
#pragma unroll
        for (int i = 0; i < STORED_TOKENS / 16; ++i) {
            const float* from = d[tile] + (first_token / 8 + 2 * i) * 4;
            // matrices: tokens 0 to 7, rows 0 to 7; the same tokens, rows 8 to 15; tokens 8 to 15, the same two
            const int token = 16 * i + lane / 16 * 8 + lane % 8, chunk = 2 * warp + lane / 8 % 2;
            store_transposed(memory + token * 128 + ((chunk ^ token % 8) << 4),
                             rounded_pair<T>(from[0] + bias[0], from[1] + bias[0]),
                             rounded_pair<T>(from[2] + bias[1], from[3] + bias[1]),
                             rounded_pair<T>(from[4] + bias[0], from[5] + bias[0]),
                             rounded_pair<T>(from[6] + bias[1], from[7] + bias[1]));
        }
        fence_async_proxy();
        named_barrier<128>(2 + group);
        if (thread == 0) store_box(y, first_out, token_tile * TOKENS + first_token, memory);
    }
}

template <typename T, int ROWS, int TOKENS, bool IN_FLIGHT, int CLUSTER>
__device__ void compute(const Task& task, const CUtensorMap& y, uint32_t ring, Control<SLOTS, ROWS>* control, int group) {
    const uint32_t memory = ring + RING_KIB * 1024 + group * STORE_BYTES;
    const Segment* segments = task.segments + size_t(blockIdx.x / CLUSTER) * task.most;
    const int rank = CLUSTER == 1 ? 0 : cluster_rank();
    const Shares shares = {task.shares.sums + size_t(rank) * task.slots * OUTPUTS / 4, task.shares.arrivals + rank * task.slots};
    int step = 0;
    for (Segment segment = *segments, next; segment.row >= 0; segment = next) {
        next = *++segments;  // on its way while this one is made
        float d[ROWS][TOKENS / 2] = {};
        if constexpr (ROWS == 1 && IN_FLIGHT) {
            int column = segment.begin;
            const auto arrive = [&] {  // whether the next tile is 2:4
                const int slot = step % SLOTS;
                barrier_wait(shared_address(control->full + slot), step / SLOTS & 1);
                return (control->kinds[slot][0] & SPARSE_BIT) != 0;
            };
            bool sparse = arrive();
            while (column < segment.end) {
                const int from = step;
                if (sparse) {
                    do {
                        const uint32_t unit = ring + control->places[step % SLOTS], tile = unit + TOKENS * TILE_COLUMNS * 2;
                        const uint32_t metadata = metadata_of(tile, 64 * group);
                        wgmma_begin();
                        multiply_sparse<T, TOKENS>(d[0], tile, 64 * group, operand_of_128_byte_rows(unit), metadata);
                        wgmma_commit();
                        wgmma_wait<1>();
                        if (step > from) release<CLUSTER>(control, (step - 1) % SLOTS);
                        ++step;
                        if (++column < segment.end) sparse = arrive();
                    } while (column < segment.end && sparse);
                    wgmma_wait<0>();
                } else {
                    do {
                        const uint32_t unit = ring + control->places[step % SLOTS], tile = unit + TOKENS * TILE_COLUMNS * 2;
                        wgmma_begin();
                        multiply_dense<T, TOKENS>(d[0], tile, 64 * group, operand_of_128_byte_rows(unit));
                        wgmma_commit();
                        wgmma_wait<1>();
                        if (step > from) release<CLUSTER>(control, (step - 1) % SLOTS);
                        ++step;
                        if (++column < segment.end) sparse = arrive();
                    } while (column < segment.end && !sparse);
                    wgmma_wait<0>();
                }
                release<CLUSTER>(control, (step - 1) % SLOTS);
            }
        } else {
        for (int column = segment.begin; column < segment.end; ++column, ++step) {
            const int slot = step % SLOTS;
            barrier_wait(shared_address(control->full + slot), step / SLOTS & 1);
            multiply<T, TOKENS, ROWS>(d, ring, control, slot, group);
            if (IN_FLIGHT) {
                wgmma_wait<ROWS>();
                if (column > segment.begin) release<CLUSTER>(control, (step - 1) % SLOTS);
            } else {
                wgmma_wait<0>();
                release<CLUSTER>(control, slot);
            }
        }
        if (IN_FLIGHT) {
            wgmma_wait<0>();
            release<CLUSTER>(control, (step - 1) % SLOTS);
        }
        }
        if (segment.from == segment.to ||
            add_up(d, shares, segment.slot, segment.from, segment.to, &control->last))
            store<T, ROWS, TOKENS>(task, y, d, segment.row, segment.token_tile * CLUSTER + rank, memory, group);
    }
    if (threadIdx.x % 128 == 0) stores_have_finished();
}

template <typename T, int ROWS, int TOKENS, bool IN_FLIGHT, int CLUSTER>
__global__ void __launch_bounds__(THREADS, 1)
    prefill(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap y, const Task task) {
    extern __shared__ __align__(1024) uint8_t ring_memory[];
    const uint32_t ring = shared_address(ring_memory);
    auto* control = reinterpret_cast<Control<SLOTS, ROWS>*>(ring_memory + RING_KIB * 1024 + GROUPS * STORE_BYTES);
    if (threadIdx.x == 0) {
        prefetch_map(x);
        control->init(CLUSTER);
    }
    if constexpr (CLUSTER == 1)
        __syncthreads();
    else
        cluster_barrier();
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (group == GROUPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        if (threadIdx.x / 32 == CONSUMERS / 32) load<ROWS, TOKENS, CLUSTER>(task, x, ring, control);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
        compute<T, ROWS, TOKENS, IN_FLIGHT, CLUSTER>(task, y, ring, control, group);
    }
    __syncwarp();
    if constexpr (CLUSTER > 1) cluster_barrier();  // no block may leave while another still sends to it
}

struct Launch {
    const void* x;
    void* y;
    int64_t x_stride;
    int in_features, tokens, blocks;
    cudaStream_t stream;
};

template <typename T, int ROWS, bool IN_FLIGHT, int CLUSTER>
const char* launch(const Task& task, const Launch& how) {
    constexpr int TOKENS = OUTPUTS / ROWS / TILE_ROWS, BYTES = RING_KIB * 1024 + GROUPS * STORE_BYTES + sizeof(Control<SLOTS, ROWS>);
    CUtensorMap x, y;
    if (const char* error = describe_matrix<T>(&x, how.x, how.tokens, how.in_features, how.x_stride, TOKENS)) return error;
    if (const char* error =
            describe_matrix<T>(&y, how.y, how.tokens, task.out_features, task.out_features, STORED_TOKENS))
        return error;
    auto* kernel = prefill<T, ROWS, TOKENS, IN_FLIGHT, CLUSTER>;
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
    if (status != cudaSuccess) return cudaGetErrorString(status);
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = CLUSTER;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = how.blocks * CLUSTER;
    config.blockDim = THREADS;
    config.dynamicSmemBytes = BYTES;
    config.stream = how.stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    status = cudaLaunchKernelEx(&config, kernel, x, y, task);
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

template <typename T>
const char* launch_variant(int rows, int in_flight, int cluster, const Task& task, const Launch& how) {
    if (rows == 1) return in_flight ? launch<T, 1, true, 1>(task, how) : launch<T, 1, false, 1>(task, how);
    if (cluster == 2) return launch<T, 2, true, 2>(task, how);
    return in_flight ? launch<T, 2, true, 1>(task, how) : launch<T, 2, false, 1>(task, how);
}

// Null, or what went wrong.
extern "C" const char* patch_prefill(int half, const void* x, int64_t x_stride, const void* payload,
                                     const void* descriptors, const void* segments, const void* bias, void* y,
                                     void* partial_sums, void* arrivals, int blocks, int most, int tile_rows, int columns,
                                     int out_features, int in_features, int tokens, int slots, int rows, int in_flight,
                                     int cluster, void* stream) {
    const Task task = {static_cast<const uint8_t*>(payload),
                       static_cast<const int*>(descriptors),
                       static_cast<const Segment*>(segments),
                       bias,
                       {static_cast<float4*>(partial_sums), static_cast<int*>(arrivals)},
                       most,
                       tile_rows,
                       columns,
                       out_features,
                       slots};
    const Launch how = {x, y, x_stride, in_features, tokens, blocks, cudaStream_t(stream)};
    return half ? launch_variant<__half>(rows, in_flight, cluster, task, how)
                : launch_variant<__nv_bfloat16>(rows, in_flight, cluster, task, how);
}
