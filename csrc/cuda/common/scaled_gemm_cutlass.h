// Products of two block-scaled operands, built from CUTLASS's collectives for sm_100 and sm_120.
//
// The weight is operand A and the activations are B, so that the tile is wide along N, where there always are rows, and narrow
// along M; the result is y^T, [N, M] with its columns contiguous, which is y [M, N] as it lies.
//
//             B: x^T  [K, M]             A row of y^T belongs to one output feature: bias is a column vector.
//           +------+------+              The sums of a tile are finished in registers as
//     A: W  |      |      |
//   [N, K]  |      | y^T  |                  y = round(sum * (w_global * x_global) + bias)
//
// fp16 and bf16 results come from one kernel (Finish), because each kernel costs a minute of compile time.
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/detail/sm100_blockscaled_layout.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/dispatch_policy.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/dispatch_policy.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/gemm/kernel/tile_scheduler.hpp>

#include <string>
#include <type_traits>

#include "check.h"
#include "finish.h"
#include "scaled_gemm.h"

namespace quantlib::cuda {

namespace fusion = cutlass::epilogue::fusion;
using cute::_0;
using cute::_1;
using cute::Int;
using cute::Shape;
using cute::Stride;

// Operands: what CUTLASS calls the pair of an element and its scale, and how many elements a row is a multiple of (16 bytes; 128
// elements where E2M1 is spread to bytes on its way into shared memory).
struct Nvfp4 {
    using W = cutlass::nv_float4_t<cutlass::float_e2m1_t>;
    using X = W;
    static constexpr int w_alignment = 32, x_alignment = 32;
};
struct Mxfp4 {
    using W = cutlass::mx_float4_t<cutlass::float_e2m1_t>;
    using X = W;
    static constexpr int w_alignment = 32, x_alignment = 32;
};
struct Mxfp8 {
    using W = cutlass::mx_float8_t<cutlass::float_e4m3_t>;
    using X = W;
    static constexpr int w_alignment = 16, x_alignment = 16;
};
struct Mxfp8Mxfp4 {  // activations, weights
    using W = cutlass::mx_float4_t<cutlass::float_e2m1_t>;
    using X = cutlass::mx_float8_t<cutlass::float_e4m3_t>;
    static constexpr int w_alignment = 128, x_alignment = 16;
};

// Shapes of a kernel. Mma: the tile that one or (Multiprocessors = 2) two multiprocessors multiply together.
template <class Chip_, class Mma_, class Cluster_, int Multiprocessors, class Schedule_, class EpilogueSchedule_, class Scheduler_>
struct Tile {
    using Chip = Chip_;
    using Mma = Mma_;
    using Cluster = Cluster_;
    using Schedule = Schedule_;
    using EpilogueSchedule = EpilogueSchedule_;
    using Scheduler = Scheduler_;
    using OfOne = Shape<Int<cute::tuple_element_t<0, Mma>::value / Multiprocessors>, cute::tuple_element_t<1, Mma>,
                        cute::tuple_element_t<2, Mma>>;
};

template <class T>
T* address(std::uintptr_t where) {
    return reinterpret_cast<T*>(where);
}

inline std::string in_words(const ScaledGemm& p) { return in_words({{"M", p.m}, {"N", p.n}, {"K", p.k}}); }

// CUTLASS's status as an error that names kernel and shape.
inline void check(cutlass::Status status, const char* kernel, const ScaledGemm& p) {
    if (status == cutlass::Status::kSuccess) return;
    const bool sizes = status == cutlass::Status::kInvalid;  // from can_implement, for alignments it doesn't name
    const char* reason = sizes ? "N or K isn't a multiple of what tensor copies need" : cutlassGetStatusString(status);
    throw CudaError(kernel, in_words(p), reason, 0);
}

// What all kernels have in common: A [rows of D, K] and B [columns of D, K], both with K contiguous, and how a tile is finished.
template <class A, int A_ALIGNMENT, class B, int B_ALIGNMENT, class D, class Order, int D_ALIGNMENT, class Tile, class Finishing>
struct Product {
    using Class = cutlass::arch::OpClassBlockScaledTensorOp;
    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        typename Tile::Chip, Class, typename Tile::Mma, typename Tile::Cluster, cutlass::epilogue::collective::EpilogueTileAuto,
        float, float, void, Order, D_ALIGNMENT, D, Order, D_ALIGNMENT, typename Tile::EpilogueSchedule, Finishing>::CollectiveOp;
    using Stages =
        cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        typename Tile::Chip, Class, A, cutlass::layout::RowMajor, A_ALIGNMENT, B, cutlass::layout::ColumnMajor, B_ALIGNMENT, float,
        typename Tile::Mma, typename Tile::Cluster, Stages, typename Tile::Schedule>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int>, Mainloop, Epilogue, typename Tile::Scheduler>;
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
    using Arguments = typename Gemm::Arguments;

    // A row of an operand is `k` elements after the one before.
    static typename Mainloop::Arguments operands(std::uintptr_t a, std::uintptr_t a_scales, std::uintptr_t b,
                                                 std::uintptr_t b_scales, int rows, int columns, int k) {
        using Scale = typename Mainloop::ElementSF;
        using Scales = typename Mainloop::Sm1xxBlkScaledConfig;
        const auto shape = cute::make_shape(rows, columns, k, 1);
        return {
            address<const typename Mainloop::ElementA>(a), {k, _1{}, 0},
            address<const typename Mainloop::ElementB>(b), {k, _1{}, 0},
            address<const Scale>(a_scales), Scales::tile_atom_to_shape_SFA(shape),
            address<const Scale>(b_scales), Scales::tile_atom_to_shape_SFB(shape),
        };
    }

    static void run(const char* name, const ScaledGemm& p, const Arguments& arguments) {
        check(Gemm::can_implement(arguments), name, p);
        Gemm gemm;
        check(gemm.run(arguments, address<void>(p.workspace), address<CUstream_st>(p.stream)), name, p);
    }
};

// y = x W^T in 16 bits: the kernel of a pair of operands and a tile.
template <class Operands, class Tile>
struct Scaled {
    using Y = cutlass::bfloat16_t;
    using Finishing = fusion::Sm90EVT<fusion::Sm90Compute<Finish, Y, float, cutlass::FloatRoundStyle::round_to_nearest>,
                                      fusion::Sm90AccFetch,                                                   // sum
                                      fusion::Sm90ScalarBroadcast<float, Stride<_0, _0, _0>, 2>,              // alpha
                                      fusion::Sm90ColBroadcast<0, typename Tile::OfOne, Y, float, Stride<_1, _0, _0>>>;  // bias
    using Product = cuda::Product<typename Operands::W, Operands::w_alignment, typename Operands::X, Operands::x_alignment, Y,
                                  cutlass::layout::ColumnMajor, 8, Tile, Finishing>;

    static typename Product::Arguments arguments(const ScaledGemm& p) {
        typename Finishing::Arguments finishing{
            {},
            {{1.0f, 1.0f}, {address<const float>(p.w_global), address<const float>(p.x_global)}, {}},
            {address<const Y>(p.bias), Y(0), {}},
            {p.half},
        };
        typename Product::Arguments arguments{
            cutlass::gemm::GemmUniversalMode::kGemm,
            {p.n, p.m, p.k},
            Product::operands(p.w_codes, p.w_scales, p.x_codes, p.x_scales, p.n, p.m, p.k),
            {finishing, nullptr, {_1{}, p.n, 0}, address<Y>(p.y), {_1{}, p.n, 0}},
        };
        arguments.hw_info.sm_count = p.sms;
        if constexpr (std::is_same_v<typename Tile::Scheduler, cutlass::gemm::StreamKScheduler>) {
            using Sharing = decltype(arguments.scheduler.decomposition_mode);
            arguments.scheduler.decomposition_mode = p.share_k ? Sharing::Heuristic : Sharing::DataParallel;
        }
        return arguments;
    }

    static void run(const char* name, const ScaledGemm& p) {
        if (const std::size_t needed = workspace(p); needed > p.workspace_bytes) {
            throw CudaError(name, in_words(p), "needs a workspace of " + std::to_string(needed) + " bytes", 0);
        }
        Product::run(name, p, arguments(p));
    }

    static std::size_t workspace(const ScaledGemm& p) { return Product::Gemm::get_workspace_size(arguments(p)); }
};

// y in NVFP4 again: a block's scale is its largest magnitude / 6 in units of y's global scale, rounded to E4M3; its codes are
// y / scale, rounded, by an approximate inverse of the scale. Here x is operand A, so that blocks lie along a row of y.
template <class Tile>
struct Quantizing {
    using Code = cutlass::float_e2m1_t;
    using Scale = cutlass::float_ue4m3_t;
    using Bias = cutlass::bfloat16_t;
    using Finishing = fusion::LinCombPerColBiasBlockScaleFactor<16, Code, float, Scale, cutlass::layout::RowMajor, Bias, void>;
    using Product = cuda::Product<Nvfp4::X, Nvfp4::x_alignment, Nvfp4::W, Nvfp4::w_alignment, Code, cutlass::layout::RowMajor, 32,
                                  Tile, Finishing>;

    static typename Product::Arguments arguments(const QuantizingGemm& q) {
        const ScaledGemm& p = q.gemm;
        typename Product::Arguments arguments{
            cutlass::gemm::GemmUniversalMode::kGemm,
            {p.m, p.n, p.k},
            Product::operands(p.x_codes, p.x_scales, p.w_codes, p.w_scales, p.m, p.n, p.k),
            {{}, nullptr, {p.n, _1{}, 0}, address<Code>(p.y), {p.n, _1{}, 0}},
        };
        auto& finishing = arguments.epilogue.thread;
        finishing.alpha_ptr = address<const float>(q.alpha);
        finishing.bias_ptr = address<const Bias>(p.bias);
        finishing.block_scale_factor_ptr = address<Scale>(q.y_scales);
        finishing.norm_constant_ptr = address<const float>(q.y_inverse_global);
        arguments.hw_info.sm_count = p.sms;
        return arguments;
    }

    // K isn't shared, so that no scratch memory is needed.
    static void run(const char* name, const QuantizingGemm& q) { Product::run(name, q.gemm, arguments(q)); }
};

}  // namespace quantlib::cuda
