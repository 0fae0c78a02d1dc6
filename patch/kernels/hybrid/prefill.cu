// y = x W^T + bias for many tokens, at the speed of the tensor cores: wgmma.sp for 2:4 tiles of W, wgmma for dense ones,
// into the same accumulators.
//
// A block makes 128 rows of W times 256 tokens at a time and goes down the columns of W, 64 a step. One warp fills a
// ring of steps, two groups of four warps multiply, each 64 rows of W.
//
//       step of the ring, 48 KiB:    | tile of W, 16 KiB | x [256 tokens, 64 columns], 32 KiB |
//
// Two blocks, a cluster, work on the same tokens and on rows of tiles with about as many dense ones. Each reads half of x
// for both: what a step reads bounds the kernel, not what the tensor cores multiply.
//
// Clusters stay, and take every so-manieth piece of work; the rows of W with most dense tiles come first, so that those
// that run at the same time have about equal work. Results leave through shared memory, transposed to rows of tokens.

#include "hopper.cuh"

constexpr int TOKENS = 256, BLOCKS = 2, GROUPS = 2, CONSUMERS = 128 * GROUPS, THREADS = CONSUMERS + 128, STAGES = 4;
constexpr uint32_t STEP_BYTES = DENSE_BYTES + TOKENS * TILE_COLUMNS * 2;
constexpr int STORED_TOKENS = 128;  // at a time, by each group: rows of 64 outputs, 128 bytes
constexpr uint32_t STORE_BYTES = STORED_TOKENS * 128;
constexpr int TOKEN_TILES_AT_ONCE = 16;  // their activations stay in the L2 cache

struct Task {
    const uint8_t* payload;
    const int* descriptors;  // [tile rows, columns]
    const int* order;        // [tile rows]
    const void* bias;        // [out] or null
    int tile_rows, columns, out_features, tokens;
};

struct Control {
    uint64_t full[STAGES], empty[STAGES];  // mbarriers
    volatile uint32_t kinds[STAGES];       // descriptors of the tiles in the ring
};

constexpr uint32_t SHARED_BYTES = STAGES * STEP_BYTES + GROUPS * STORE_BYTES + sizeof(Control);

struct Piece {
    int tile_row, token_tile;
};

struct Work {  // of a cluster: pieces number `first`, first + `step` and so on
    int first, step, pieces, pairs;

    __device__ Work(const Task& task)
        : first(blockIdx.x / BLOCKS), step(gridDim.x / BLOCKS), pairs((task.tile_rows + BLOCKS - 1) / BLOCKS) {
        pieces = pairs * ((task.tokens + TOKENS - 1) / TOKENS);
    }

    // This block's part of a piece; the second block of the last pair may have a row below the last one.
    __device__ Piece piece(const Task& task, int index) const {
        const int token_tiles = (task.tokens + TOKENS - 1) / TOKENS;
        const int batch = index / (pairs * TOKEN_TILES_AT_ONCE), first = batch * TOKEN_TILES_AT_ONCE;
        const int width = min(TOKEN_TILES_AT_ONCE, token_tiles - first), place = index - first * pairs;
        const int row = place / width * BLOCKS + int(blockIdx.x % BLOCKS);
        return {row < task.tile_rows ? task.order[row] : task.tile_rows, first + place % width};
    }
};

__device__ void load(const Task& task, const CUtensorMap& x, uint32_t ring, Control* control, const Work& work) {
    const uint32_t full = shared_address(control->full), empty = shared_address(control->empty);
    const int lane = threadIdx.x % 32, half = blockIdx.x % BLOCKS * (TOKENS / BLOCKS);
    int step = 0;
    for (int index = work.first; index < work.pieces; index += work.step) {
        const Piece piece = work.piece(task, index);
        const int* descriptors = task.descriptors + size_t(piece.tile_row) * task.columns;
        const int columns = piece.tile_row < task.tile_rows ? task.columns : 0;
        const auto batch = [&](int from) { return from + lane < columns ? uint32_t(descriptors[from + lane]) : NO_TILE; };
        uint32_t held = batch(0), next = batch(32);
        for (int column = 0; column < task.columns; ++column, ++step) {
            if (column && column % 32 == 0) {
                held = next;
                next = batch(column + 32);
            }
            const uint32_t descriptor = __shfl_sync(~0u, held, column % 32);
            const int stage = step % STAGES;
            if (step >= STAGES) barrier_wait(empty + 8 * stage, (step / STAGES - 1) & 1);
            if (lane) continue;  // the shuffle of the next step brings the warp together again
            const uint32_t tile = ring + stage * STEP_BYTES, bytes = tile_bytes(descriptor);
            control->kinds[stage] = descriptor;
            barrier_arrive_expect(full + 8 * stage, bytes + TOKENS * TILE_COLUMNS * 2);
            if (bytes) copy_bytes(tile, tile_address(task.payload, descriptor), bytes, full + 8 * stage, EVICT_NORMAL);
            copy_box_to_all<BLOCKS>(tile + DENSE_BYTES + half * TILE_COLUMNS * 2, x, column * TILE_COLUMNS,
                                    piece.token_tile * TOKENS + half, full + 8 * stage);
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

// 64 rows of W by 256 tokens, to y through this group's shared memory.
template <typename T>
__device__ void store(const Task& task, const CUtensorMap& y, const float (&d)[TOKENS / 2], int first_out, int first_token,
                      uint32_t memory, int group) {
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    float bias[2] = {};
#pragma unroll
    for (int below = 0; below < 2; ++below) {
        const int out = first_out + 16 * warp + lane / 4 + 8 * below;
        if (task.bias && out < task.out_features) bias[below] = float(static_cast<const T*>(task.bias)[out]);
    }
#pragma unroll
    for (int part = 0; part < TOKENS / STORED_TOKENS; ++part) {
        if (thread == 0) stores_have_read();  // those of the part before
        named_barrier<128>(1 + group);
#pragma unroll
        for (int i = 0; i < STORED_TOKENS / 16; ++i) {
            const float* from = d + (part * STORED_TOKENS / 8 + 2 * i) * 4;
            // matrices: tokens 0 to 7, rows 0 to 7; the same tokens, rows 8 to 15; tokens 8 to 15, the same two
            const int token = 16 * i + lane / 16 * 8 + lane % 8, chunk = 2 * warp + lane / 8 % 2;
            store_transposed(memory + token * 128 + ((chunk ^ token % 8) << 4),
                             rounded_pair<T>(from[0] + bias[0], from[1] + bias[0]),
                             rounded_pair<T>(from[2] + bias[1], from[3] + bias[1]),
                             rounded_pair<T>(from[4] + bias[0], from[5] + bias[0]),
                             rounded_pair<T>(from[6] + bias[1], from[7] + bias[1]));
        }
        fence_async_proxy();
        named_barrier<128>(1 + group);
        if (thread == 0) store_box(y, first_out, first_token + part * STORED_TOKENS, memory);
    }
}

// What a step needs to know of its tile. Both groups multiply in step, so the tensor cores would wait while it is read:
// it is read while they work on the step before.
struct Tile {
    uint32_t kind, metadata;
};

template <typename T>
__device__ void compute(const Task& task, const CUtensorMap& y, uint32_t ring, Control* control, const Work& work,
                        int group) {
    const uint32_t full = shared_address(control->full), empty = shared_address(control->empty);
    const uint32_t memory = ring + STAGES * STEP_BYTES + group * STORE_BYTES;
    const uint32_t others_empty = address_in_block(empty, blockIdx.x % BLOCKS ^ 1);
    const int steps = (work.pieces - work.first + work.step - 1) / work.step * task.columns;
    const auto look_at = [&](int step) -> Tile {
        if (step >= steps) return {};
        const int stage = step % STAGES;
        barrier_wait(full + 8 * stage, step / STAGES & 1);
        return {control->kinds[stage], metadata_of(ring + stage * STEP_BYTES, 64 * group)};  // none if it is dense
    };
    // 0, unknown to ptxas: a register that wgmma reads must be written outside of the products, else they run one by one
    const uint32_t zero = uint32_t(task.tokens) >> 31;
    int step = 0;
    Tile now = look_at(step), next;
    for (int index = work.first; index < work.pieces; index += work.step) {
        const Piece piece = work.piece(task, index);
        float d[TOKENS / 2] = {};
        for (int column = 0; column < task.columns; ++column, ++step) {
            const int stage = step % STAGES;
            const uint32_t tile = ring + stage * STEP_BYTES;
            const uint64_t b = operand_of_128_byte_rows(tile + DENSE_BYTES);
            if (now.kind & SPARSE_BIT) {
                wgmma_begin();
                multiply_sparse<T, TOKENS>(d, tile, 64 * group, b, now.metadata);
                wgmma_commit();
                next = look_at(step + 1);
                wgmma_wait();
            } else {
                wgmma_begin();
                multiply_dense<T, TOKENS>(d, tile, 64 * group, b);
                wgmma_commit();
                next = look_at(step + 1);
                wgmma_wait();
            }
            now = {next.kind, next.metadata ^ zero};
            barrier_arrive(empty + 8 * stage);  // every lane, for what it has read itself
            if (threadIdx.x % 32 == 0) barrier_arrive_there(others_empty + 8 * stage);  // x has been read
        }
        store<T>(task, y, d, piece.tile_row * TILE_ROWS + 64 * group, piece.token_tile * TOKENS, memory, group);
    }
    if (threadIdx.x % 128 == 0) stores_have_finished();
}

template <typename T>
__global__ void __cluster_dims__(BLOCKS) __launch_bounds__(THREADS, 1)
    prefill(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap y, const Task task) {
    extern __shared__ __align__(1024) uint8_t ring_memory[];
    const uint32_t ring = shared_address(ring_memory);
    auto* control = reinterpret_cast<Control*>(ring_memory + STAGES * STEP_BYTES + GROUPS * STORE_BYTES);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(shared_address(control->full + stage), 1);
            barrier_init(shared_address(control->empty + stage), CONSUMERS + (BLOCKS - 1) * CONSUMERS / 32);
        }
        barrier_init_fence();
    }
    cluster_sync();
    const Work work(task);
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (group == GROUPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x / 32 == CONSUMERS / 32) load(task, x, ring, control, work);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        compute<T>(task, y, ring, control, work, group);
    }
    cluster_sync();  // the other block may still write here
}

struct Launch {
    const void* x;
    void* y;
    int64_t x_stride;
    int in_features, blocks;
    cudaStream_t stream;
};

template <typename T>
const char* launch(const Task& task, const Launch& how) {
    CUtensorMap x, y;
    if (const char* error = describe_matrix<T>(&x, how.x, task.tokens, how.in_features, how.x_stride, TOKENS / BLOCKS))
        return error;
    if (const char* error =
            describe_matrix<T>(&y, how.y, task.tokens, task.out_features, task.out_features, STORED_TOKENS))
        return error;
    auto* kernel = prefill<T>;
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
    if (status != cudaSuccess) return cudaGetErrorString(status);
    cudaLaunchConfig_t config = {};
    config.gridDim = how.blocks / BLOCKS * BLOCKS;
    config.blockDim = THREADS;
    config.dynamicSmemBytes = SHARED_BYTES;
    config.stream = how.stream;
    status = cudaLaunchKernelEx(&config, kernel, x, y, task);
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// Null, or what went wrong.
extern "C" const char* patch_prefill(int half, const void* x, int64_t x_stride, const void* payload,
                                     const void* descriptors, const void* order, const void* bias, void* y,
                                     int blocks, int tile_rows, int columns, int out_features, int in_features,
                                     int tokens, void* stream) {
    const Task task = {static_cast<const uint8_t*>(payload),
                       static_cast<const int*>(descriptors),
                       static_cast<const int*>(order),
                       bias,
                       tile_rows,
                       columns,
                       out_features,
                       tokens};
    const Launch how = {x, y, x_stride, in_features, blocks, cudaStream_t(stream)};
    return half ? launch<__half>(task, how) : launch<__nv_bfloat16>(task, how);
}
