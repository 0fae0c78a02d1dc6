// What decode and prefill have in common: a ring of bytes in shared memory between the copy engine and the tensor cores,
// and sums that several blocks have a part of.
//
// A unit of work is ROWS tiles under one another and the 64 columns of x that they need. Units lie in the ring one behind
// the other, 2:4 tiles in less space than dense ones, and none across its end:
//
//     | x | tile | tile | x | tile | tile | x | tile | tile | ... free |    -> two groups of four warps multiply: each
//                                                                             takes 64 of the 128 rows of every tile
#pragma once

#include "hopper.cuh"

constexpr int GROUPS = 2, CONSUMERS = 128 * GROUPS;

template <int SLOTS, int ROWS>
struct Control {
    uint64_t full[SLOTS], empty[SLOTS];     // mbarriers
    volatile uint32_t places[SLOTS];        // where the units are, in bytes from the start of the ring
    volatile uint32_t kinds[SLOTS][ROWS];   // descriptors of their tiles
    volatile int last;

    __device__ void init(int cluster = 1) {  // by one thread
        for (int slot = 0; slot < SLOTS; ++slot) {
            barrier_init(shared_address(full + slot), 1);
            barrier_init(shared_address(empty + slot), cluster * CONSUMERS / 32);
        }
        barrier_init_fence();
    }
};

// Fills the ring; a warp together. Places count on in KiB from round to round of the ring.
template <int RING_KIB, int SLOTS, int ROWS, int TOKENS, int CLUSTER = 1>
struct Filler {
    static_assert(SLOTS <= 32);  // lanes
    static constexpr uint32_t X_KIB = TOKENS * TILE_COLUMNS * 2 / 1024;

    const uint8_t* payload;
    uint32_t ring;
    Control<SLOTS, ROWS>* control;
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
        for (; !has_room(tiles_kib); ++oldest) {
            if constexpr (CLUSTER == 1)
                barrier_wait(shared_address(control->empty + oldest % SLOTS), oldest / SLOTS & 1);
            else
                barrier_wait_cluster(shared_address(control->empty + oldest % SLOTS), oldest / SLOTS & 1);
        }
    }

    // The tiles of the next unit, for which there is room. The payload has them behind one another.
    __device__ void load_tiles(const uint32_t (&descriptors)[ROWS], uint32_t tiles_kib, uint64_t policy) {
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
        if constexpr (CLUSTER == 1) {
            copy_bytes(to, from, tiles_kib * 1024, full, policy);
        } else {
            const uint32_t rank = cluster_rank(), half = tiles_kib / 2 * 1024, skipped = rank * half;
            copy_bytes_to_all(to + skipped, from + skipped, rank ? tiles_kib * 1024 - half : half, full, 3, policy);
        }
    }

    // x for a unit whose tiles have been loaded.
    __device__ void load_x(int unit, const CUtensorMap& x, int column, int token) const {
        if (threadIdx.x % 32) return;
        const int slot = unit % SLOTS;
        copy_box(ring + control->places[slot], x, column * TILE_COLUMNS, token, shared_address(control->full + slot));
    }
};

template <int ROWS>
__device__ inline uint32_t kib_of_tiles(const uint32_t (&descriptors)[ROWS]) {
    uint32_t bytes = 0;
#pragma unroll
    for (int row = 0; row < ROWS; ++row) bytes += tile_bytes(descriptors[row]);
    return bytes / 1024;
}

// d[ROWS][N / 2] += this group's half of each of the unit's tiles times x, as ROWS groups of wgmma that go on running.
template <typename T, int N, int ROWS, int SLOTS>
__device__ inline void multiply(float (&d)[ROWS][N / 2], uint32_t ring, const Control<SLOTS, ROWS>* control, int slot,
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

template <int CLUSTER = 1, int SLOTS, int ROWS>
__device__ inline void release(Control<SLOTS, ROWS>* control, int slot) {
    __syncwarp();
    if constexpr (CLUSTER == 1) {
        if (threadIdx.x % 32 == 0) barrier_arrive(shared_address(control->empty + slot));
    } else {
        if (threadIdx.x % 32 < CLUSTER) barrier_arrive_remote(shared_address(control->empty + slot), threadIdx.x % 32);
    }
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
