// Hopper's instructions that the kernels here are made of, one function each, and the few numbers of the weight format.
// Names and limits are those of the PTX manual.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

// The format of format.py, version 1.
constexpr int TILE_ROWS = 128, TILE_COLUMNS = 64;
constexpr uint32_t DENSE_BYTES = 16384, SPARSE_VALUES = 8192, SPARSE_BYTES = 9216;
constexpr uint32_t SPARSE_BIT = 1u << 31;    // of a descriptor; the rest is the tile's place in KiB
constexpr uint32_t NO_TILE = SPARSE_BIT - 1;  // fills up groups of tile rows

__device__ inline uint32_t tile_bytes(uint32_t descriptor) {
    if (descriptor == NO_TILE) return 0;
    return descriptor & SPARSE_BIT ? SPARSE_BYTES : DENSE_BYTES;
}

__device__ inline const uint8_t* tile_address(const uint8_t* payload, uint32_t descriptor) {
    return payload + size_t(descriptor & ~SPARSE_BIT) * 1024;
}

__device__ inline uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// ---- mbarriers: a phase ends when all arrivals and all announced bytes are there

__device__ inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier), "r"(parity)
        : "memory");
}

// ---- clusters

// Where the other block `rank` of the cluster has what is at `address` here.
__device__ inline uint32_t address_in_block(uint32_t address, uint32_t rank) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

// To say that what the other block may write over has been read; `barrier` as of address_in_block. Not of cluster scope:
// ptxas would have everything that was written reach the L2 cache first, which takes longer than a product.
__device__ inline void barrier_arrive_there(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void cluster_sync() {  // __syncthreads of all its blocks
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

template <int THREADS>
__device__ inline void named_barrier(int id) {  // __syncthreads of some of the warps
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
}

// ---- copies by the asynchronous engine, which report to an mbarrier

constexpr uint64_t EVICT_NORMAL = 0x1000000000000000;
constexpr uint64_t EVICT_FIRST = 0x12F0000000000000;  // the policies that createpolicy would return
constexpr uint64_t EVICT_LAST = 0x14F0000000000000;

__device__ inline void copy_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}

__device__ inline void prefetch_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The box at (column, row) of a matrix; what lies outside is zero.
__device__ inline void copy_box(uint32_t to, const CUtensorMap& map, int column, int row, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier), "l"(EVICT_LAST)
        : "memory");
}

// Likewise, to the same place in the shared memory of the first BLOCKS blocks of the cluster; all their barriers hear of it.
template <int BLOCKS>
__device__ inline void copy_box_to_all(uint32_t to, const CUtensorMap& map, int column, int row, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
        "[%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(uint16_t((1 << BLOCKS) - 1)), "l"(EVICT_LAST)
        : "memory");
}

__device__ inline void store_box(const CUtensorMap& map, int column, int row, uint32_t from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(column),
                 "r"(row), "r"(from)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

__device__ inline void stores_have_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ inline void stores_have_finished() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Shared memory written by threads is now visible to the copy engine and the tensor cores.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- programmatic dependent launch: the next kernel may start; wait for the previous one to finish

__device__ inline void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ inline void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---- wgmma: 64 rows of A times the columns of B, by four warps; both operands in shared memory, K innermost

// Where an operand is: rows of 128 bytes (64 values of K) or 64 bytes (32 kept values), swizzled as wide as they are.
// Advancing by 16 bytes along K adds 1.
__device__ inline uint64_t operand_of_128_byte_rows(uint32_t address) {
    return uint64_t(1) << 62 | uint64_t(1024 / 16) << 32 | uint64_t(1) << 16 | (address & 0x3FFFF) >> 4;
}

__device__ inline uint64_t operand_of_64_byte_rows(uint32_t address) {
    return uint64_t(2) << 62 | uint64_t(512 / 16) << 32 | uint64_t(1) << 16 | (address & 0x3FFFF) >> 4;
}

__device__ inline void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// d[N / 2] += A * B. Lane l of warp w holds rows 16 w + l / 4 (+ 8: elements 2, 3 of each four), of columns
// 8 j + 2 (l % 4) (+ 1: elements 1, 3) in d[4 j ...].
//   dense:         16 columns of K
//   sparse<step>:  32 columns of K, of which A holds 16; `metadata` serves two steps, 0 and 1
template <typename T, int N>
struct Wgmma;

#define D_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D_8(i) D_4(i), D_4(i + 4)
#define D_16(i) D_8(i), D_8(i + 8)
#define D_32(i) D_16(i), D_16(i + 16)
#define D_64(i) D_32(i), D_32(i + 32)
#define D_128(i) D_64(i), D_64(i + 64)
#define NAMES_4 "%0, %1, %2, %3"
#define NAMES_8 NAMES_4 ", %4, %5, %6, %7"
#define NAMES_16 NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                                   \
    NAMES_32                                                                                                       \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
    "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_128                                                                                                   \
    NAMES_64                                                                                                        \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, "  \
    "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, "    \
    "%105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, " \
    "%123, %124, %125, %126, %127"

// N columns, R = N / 2 registers; A, B, E, S: the operands after those
#define WGMMA(TYPE, NAME, N, R, A, B, E, S)                                                                     \
    template <>                                                                                                 \
    struct Wgmma<TYPE, N> {                                                                                     \
        static __device__ inline void dense(float (&d)[R], uint64_t a, uint64_t b) {                            \
            asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                                         \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" NAMES_##R         \
                         "}, " A ", " B ", add, 1, 1, 0, 0;\n}"                                                 \
                         : D_##R(0)                                                                             \
                         : "l"(a), "l"(b));                                                                     \
        }                                                                                                       \
        template <int STEP>                                                                                     \
        static __device__ inline void sparse(float (&d)[R], uint64_t a, uint64_t b, uint32_t metadata) {        \
            asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                                         \
                         "wgmma.mma_async.sp.sync.aligned.m64n" #N "k32.f32." NAME "." NAME " {" NAMES_##R      \
                         "}, " A ", " B ", " E ", " S ", add, 1, 1, 0, 0;\n}"                                   \
                         : D_##R(0)                                                                             \
                         : "l"(a), "l"(b), "r"(metadata), "n"(STEP));                                           \
        }                                                                                                       \
    };
#define WGMMA_OF(TYPE, NAME)                                            \
    WGMMA(TYPE, NAME, 8, 4, "%4", "%5", "%6", "%7")                     \
    WGMMA(TYPE, NAME, 16, 8, "%8", "%9", "%10", "%11")                  \
    WGMMA(TYPE, NAME, 32, 16, "%16", "%17", "%18", "%19")               \
    WGMMA(TYPE, NAME, 64, 32, "%32", "%33", "%34", "%35")               \
    WGMMA(TYPE, NAME, 128, 64, "%64", "%65", "%66", "%67")              \
    WGMMA(TYPE, NAME, 256, 128, "%128", "%129", "%130", "%131")
WGMMA_OF(__nv_bfloat16, "bf16")
WGMMA_OF(__half, "f16")

// d[N / 2] += 64 rows of a tile, from `row` (0 or 64) on, times its 64 columns of B.
template <typename T, int N>
__device__ inline void multiply_dense(float (&d)[N / 2], uint32_t tile, int row, uint64_t b) {
    const uint64_t a = operand_of_128_byte_rows(tile + row * 128);
#pragma unroll
    for (int step = 0; step < 4; ++step) Wgmma<T, N>::dense(d, a + 2 * step, b + 2 * step);
}

template <typename T, int N>
__device__ inline void multiply_sparse(float (&d)[N / 2], uint32_t tile, int row, uint64_t b, uint32_t metadata) {
    const uint64_t a = operand_of_64_byte_rows(tile + row * 64);
    Wgmma<T, N>::template sparse<0>(d, a, b, metadata);
    Wgmma<T, N>::template sparse<1>(d, a + 2, b + 4, metadata);
}

// This thread's register of metadata for 64 rows of a 2:4 tile.
__device__ inline uint32_t metadata_of(uint32_t tile, int row) {
    uint32_t word;
    const int thread = threadIdx.x % 128;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(tile + SPARSE_VALUES + row * 8 + thread * 4));
    return word;
}

template <typename T>
__device__ inline T rounded(float value);
template <>
__device__ inline __nv_bfloat16 rounded<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}
template <>
__device__ inline __half rounded<__half>(float value) {
    return __float2half_rn(value);
}

// ---- host

// A row-major matrix for copy_box and store_box: boxes of 64 columns (128 bytes, swizzled) and `box_rows` rows.
template <typename T>
const char* describe_matrix(CUtensorMap* map, const void* data, uint64_t rows, uint64_t columns, uint64_t row_stride,
                            uint32_t box_rows) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {  // found at run time, so that nothing links to the driver
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found) ||
            found != cudaDriverEntryPointSuccess)
            function = nullptr;
        return Encode(function);
    }();
    if (!encode) return "the driver has no tensor maps; update it to CUDA 12 or later";
    constexpr bool bf16 = sizeof(T) == 2 && !__is_same(T, __half);
    const cuuint64_t sizes[] = {columns, rows}, strides[] = {row_stride * sizeof(T)};
    const cuuint32_t box[] = {TILE_COLUMNS, box_rows}, steps[] = {1, 1};
    const CUresult result = encode(map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                                   const_cast<void*>(data), sizes, strides, box, steps,
                                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? nullptr : "the activations' address or stride suits no tensor map";
}
