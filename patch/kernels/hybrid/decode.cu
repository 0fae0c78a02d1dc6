// y = x W^T + bias for 1 to 128 tokens, at the speed of reading W.
//
// Blocks take equal shares, in bytes, of the stream of W's tiles:
//
//                 columns of W ->
//     rows 0-127    | 0 0 0 0 0 0 1 1 1 1 1 1 |     (the number is the block that takes the tile)
//     rows 128-255  | 1 2 2 2 2 2 2 3 3 3 3 3 |
//
// A unit of work is one or two tiles under one another and the 64 columns of x that they need. One warp keeps a ring of
// units in shared memory filled through the copy engine. Units lie there one behind the other, 2:4 tiles in less space
// than dense ones, and none across the ring's end:
//
//     | x | tile | tile | x | tile | tile | x | tile | tile | ... free |
//
// Two groups of four warps multiply by wgmma, W's rows along M and tokens along N, each 64 of the 128 rows of every tile.
// Where a block takes no more than half of a multiprocessor's shared memory, the next layer's block moves in beside it
// and has its ring full of tiles by the time that this layer's result is ready.

#include "hopper.cuh"

constexpr int GROUPS = 2, CONSUMERS = 128 * GROUPS, THREADS = CONSUMERS + 32;
constexpr int SLOTS = 32;  // units in the ring at most, one per lane of the warp that fills it

struct Header {  // of a block's line in the schedule, before the descriptors of its units; see schedule.py
    int first, end;               // units
    int slot[2], from[2], to[2];  // partial sums of the rows of units that it starts in and ends in
};
constexpr int HEADER = sizeof(Header) / sizeof(int);

template <int ROWS>
struct Control {
    uint64_t full[SLOTS], empty[SLOTS];    // mbarriers
    volatile uint32_t places[SLOTS];       // where the units are, in bytes from the start of the ring
    volatile uint32_t kinds[SLOTS][ROWS];  // descriptors of their tiles
    volatile int last;

    __device__ void init() {  // by one thread
        for (int slot = 0; slot < SLOTS; ++slot) {
            barrier_init(shared_address(full + slot), 1);
            barrier_init(shared_address(empty + slot), CONSUMERS);
        }
        barrier_init_fence();
    }
};

// Fills the ring; a warp together. Places count on in KiB from round to round of the ring.
template <int RING_KIB, int ROWS, int TOKENS>
struct Filler {
    static constexpr uint32_t X_KIB = TOKENS * TILE_COLUMNS * 2 / 1024;

    const uint8_t* payload;
    uint32_t ring;
    Control<ROWS>* control;
    int unit = 0, oldest = 0;  // the next one; the first that may still be in use
    uint32_t next = 0;
    uint32_t begin_in_slot = 0;  // lane i: where the unit in slot i begins

    // Where a unit with this much of tiles would begin.
    __device__ uint32_t begin_of(uint32_t tiles_kib) const {
        const uint32_t left = RING_KIB - next % RING_KIB;
        return X_KIB + tiles_kib <= left ? next : next + left;
    }

    __device__ bool has_room(uint32_t tiles_kib) const {
        if (oldest == unit) return true;
        const uint32_t used_from = __shfl_sync(~0u, begin_in_slot, oldest % SLOTS);
        return unit - oldest < SLOTS && begin_of(tiles_kib) + X_KIB + tiles_kib - used_from <= RING_KIB;
    }

    __device__ void make_room(uint32_t tiles_kib) {
        for (; !has_room(tiles_kib); ++oldest)
            barrier_wait(shared_address(control->empty + oldest % SLOTS), oldest / SLOTS & 1);
    }

    // The tiles of the next unit, for which there is room. The payload has them behind one another.
    __device__ void load_tiles(const uint32_t (&descriptors)[ROWS], uint32_t tiles_kib) {
        const uint32_t begin = begin_of(tiles_kib), place = begin % RING_KIB * 1024;
        const int slot = unit % SLOTS, lane = threadIdx.x % 32;
        if (lane == slot) begin_in_slot = begin;
        next = begin + X_KIB + tiles_kib;
        ++unit;
        if (lane) return;  // the next shuffle brings the warp together again
        control->places[slot] = place;
#pragma unroll
        for (int row = 0; row < ROWS; ++row) control->kinds[slot][row] = descriptors[row];
        const uint32_t full = shared_address(control->full + slot);
        barrier_arrive_expect(full, (X_KIB + tiles_kib) * 1024);
        const uint32_t to = ring + place + X_KIB * 1024;
        const uint8_t* from = tile_address(payload, descriptors[0]);
        copy_bytes(to, from, tiles_kib * 1024, full, EVICT_FIRST);
    }

    // x for a unit whose tiles have been loaded.
    __device__ void load_x(int unit, const CUtensorMap& x, int column) const {
        if (threadIdx.x % 32) return;
        const int slot = unit % SLOTS;
        copy_box(ring + control->places[slot], x, column * TILE_COLUMNS, 0, shared_address(control->full + slot));
    }
};

template <int ROWS>
__device__ inline uint32_t kib_of_tiles(const uint32_t (&descriptors)[ROWS]) {
    uint32_t bytes = 0;
#pragma unroll
    for (int row = 0; row < ROWS; ++row) bytes += tile_bytes(descriptors[row]);
    return bytes / 1024;
}

// d[ROWS][N / 2] += this group's half of each of the unit's tiles times x; wgmma_wait() waits for it.
template <typename T, int N, int ROWS>
__device__ inline void multiply(float (&d)[ROWS][N / 2], uint32_t ring, const Control<ROWS>* control, int slot,
                                int group) {
    const uint32_t unit = ring + control->places[slot];
    uint32_t kinds[ROWS], tiles[ROWS], metadata[ROWS], end = unit + N * TILE_COLUMNS * 2;
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
        kinds[row] = control->kinds[slot][row];
        tiles[row] = end;
        end += tile_bytes(kinds[row]);
        if (kinds[row] == NO_TILE) kinds[row] = kinds[0], tiles[row] = tiles[0];  // nobody stores the products
        metadata[row] = kinds[row] & SPARSE_BIT ? metadata_of(tiles[row], 64 * group) : 0;
    }
    const uint64_t b = operand_of_128_byte_rows(unit);
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {  // the groups end in their branches: outside, ptxas runs wgmma one by one
        if (kinds[row] & SPARSE_BIT) {
            wgmma_begin();
            multiply_sparse<T, N>(d[row], tiles[row], 64 * group, b, metadata[row]);
            wgmma_commit();
        } else {
            wgmma_begin();
            multiply_dense<T, N>(d[row], tiles[row], 64 * group, b);
            wgmma_commit();
        }
    }
}

template <int ROWS>
__device__ inline void release(Control<ROWS>* control, int slot) {
    barrier_arrive(shared_address(control->empty + slot));  // every lane, for what it has read itself
}

// Sums that several blocks have a part of: each leaves its own in float32, in `slot`; the last to arrive adds up those of
// the slots `first` to `last`, in this order whoever it is, so that results repeat bit for bit.
struct Shares {
    float4* sums;   // [slots, sums of a thread / 4, CONSUMERS]
    int* arrivals;  // [slots], zero before and after; counted at `first`
};

// True if d now holds the whole sums, false if another block will have them.
template <int ROWS, int SUMS>
__device__ bool add_up(float (&d)[ROWS][SUMS], const Shares& shares, int slot, int first, int last,
                       volatile int* arrived_last) {
    constexpr int VECTORS = ROWS * SUMS / 4;
    constexpr int AT_ONCE = VECTORS > 16 ? 16 : VECTORS > 8 ? 4 : 8;  // loads on their way, as far as registers go
    constexpr int PART = VECTORS < AT_ONCE ? VECTORS : AT_ONCE, SLOTS_AT_ONCE = AT_ONCE / PART;
    float4* const sums = shares.sums + threadIdx.x;
    const auto at = [&](int i) { return d[i / (SUMS / 4)] + i % (SUMS / 4) * 4; };
#pragma unroll
    for (int i = 0; i < VECTORS; ++i)
        __stcg(sums + (size_t(slot) * VECTORS + i) * CONSUMERS, make_float4(at(i)[0], at(i)[1], at(i)[2], at(i)[3]));
    named_barrier<CONSUMERS>(1);
    if (threadIdx.x == 0) {
        __threadfence();
        *arrived_last = atomicAdd(shares.arrivals + first, 1) == last - first;
        if (*arrived_last) shares.arrivals[first] = 0;
        __threadfence();
    }
    named_barrier<CONSUMERS>(1);
    if (!*arrived_last) return false;
#pragma unroll
    for (int part = 0; part < VECTORS; part += PART) {
#pragma unroll
        for (int i = part; i < part + PART; ++i) at(i)[0] = at(i)[1] = at(i)[2] = at(i)[3] = 0;
#pragma unroll 1
        for (int from = first; from <= last; from += SLOTS_AT_ONCE) {
            float4 others[SLOTS_AT_ONCE][PART];
#pragma unroll
            for (int k = 0; k < SLOTS_AT_ONCE; ++k)
#pragma unroll
                for (int i = 0; i < PART; ++i)
                    others[k][i] = from + k <= last
                                       ? __ldcg(sums + (size_t(from + k) * VECTORS + part + i) * CONSUMERS)
                                       : make_float4(0, 0, 0, 0);
#pragma unroll
            for (int k = 0; k < SLOTS_AT_ONCE; ++k)
#pragma unroll
                for (int i = 0; i < PART; ++i) {
                    at(part + i)[0] += others[k][i].x, at(part + i)[1] += others[k][i].y;
                    at(part + i)[2] += others[k][i].z, at(part + i)[3] += others[k][i].w;
                }
        }
    }
    return true;
}

template <int ROWS>
struct Shared {
    Control<ROWS> control;
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
#pragma unroll
    for (int i = 0; i < HEADER; ++i) {  // by the lane whose arrivals at the barriers publish it
        const int number = __shfl_sync(~0u, held, i);
        if (lane == 0) reinterpret_cast<volatile int*>(&shared->header)[i] = number;
    }
    Filler<RING_KIB, ROWS, N> filler = {task.payload, ring, &shared->control};
    int with_x = 0;
    const auto load_x = [&] {
        for (; with_x < filler.unit; ++with_x) filler.load_x(with_x, x, (first + with_x) % task.columns);
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
        filler.load_tiles(descriptors, kib);
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
            wgmma_wait();
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
    config.numAttrs = 1;
    status = cudaLaunchKernelEx(&config, kernel, x, task);
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// The tunings that hopper.py chooses from.
template <typename T, int N>
const char* launch_width(const Task& task, const Launch& how) {
    constexpr int OF_ONE_ROW = N <= 16 ? 111 : 225;
    if (how.rows == 1 && how.shared_kib == OF_ONE_ROW) return launch<T, N, 1, OF_ONE_ROW>(task, how);
    if constexpr (N <= 64) {
        if (how.rows == 2 && how.shared_kib == 111) return launch<T, N, 2, 111>(task, how);
        if (how.rows == 2 && how.shared_kib == 225) return launch<T, N, 2, 225>(task, how);
    }
    return "the decode kernel has no such tuning";
}

template <typename T>
const char* launch_type(const Task& task, const Launch& how) {
    if (task.tokens <= 8) return launch_width<T, 8>(task, how);
    if (task.tokens <= 16) return launch_width<T, 16>(task, how);
    if (task.tokens <= 32) return launch_width<T, 32>(task, how);
    if (task.tokens <= 64) return launch_width<T, 64>(task, how);
    return launch_width<T, 128>(task, how);
}

// Null, or what went wrong.
extern "C" const char* patch_decode(int half, const void* x, int64_t x_stride, const void* payload, const void* schedule,
                                    const void* bias, void* y, void* partial_sums, void* arrivals, int line, int blocks,
                                    int rows, int columns, int out_features, int in_features, int tokens,
                                    int shared_kib, void* stream) {
    const Task task = {static_cast<const uint8_t*>(payload),
                       static_cast<const int*>(schedule),
                       bias,
                       y,
                       {static_cast<float4*>(partial_sums), static_cast<int*>(arrivals)},
                       line,
                       columns,
                       out_features,
                       tokens};
    const Launch how = {x, x_stride, in_features, blocks, rows, shared_kib, cudaStream_t(stream)};
    return half ? launch_type<__half>(task, how) : launch_type<__nv_bfloat16>(task, how);
}
