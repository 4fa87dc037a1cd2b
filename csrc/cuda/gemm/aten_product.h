// torch's own product (cuBLAS), for shapes where it is faster than our kernels. Host code only.
#pragma once

#include <array>

#include "common/torch_api.h"

namespace pumice::cuda {

// out = a · bᵀ, by mm.out: autocast leaves it alone, and out may be some columns of a matrix. Sums
// are in fp32, unless torch may reduce the parts of a split K in 16 bits
// (torch.backends.cuda.matmul.allow_*_reduced_precision_reduction), or multiply fp32 in TF32
// (allow_tf32).
inline void multiply_transposed(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a),
                                    torch::stable::detail::from(torch::stable::transpose(b, 0, 1)),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // what is left on the stack has an owner
}

// `length` of a tensor's indices along dim, from `start` on. By value, for torch's wants a
// variable.
inline Tensor slice(Tensor tensor, int64_t dim, int64_t start, int64_t length) {
  return torch::stable::narrow(tensor, dim, start, length);
}

}  // namespace pumice::cuda
