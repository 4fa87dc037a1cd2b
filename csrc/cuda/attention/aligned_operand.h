// Operands of attention as its 16-bit kernels read them. Host code.
#pragma once

#include "cuda/attention/attention_helpers.h"
#include "cuda/workspace.h"

namespace pumice::cuda {

// An operand as cp.async reads it: rows on boundaries of 16 bytes, and a multiple of that long.
// Where it is not, a place in the workspace for a copy that is.
class AlignedOperand {
 public:
  AlignedOperand(const Tensor& tensor, TokenView& view, Workspace& workspace) : view_(view) {
    const int64_t dims = tensor.dim();
    align_.source = view;
    align_.batch = dims == 3 ? 1 : tensor.size(0);
    align_.tokens = tensor.size(dims - 3);
    align_.heads = tensor.size(dims - 2);
    align_.dim = tensor.size(dims - 1);
    align_.stride = (align_.dim + 7) / 8 * 8;
    bool aligned = reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && align_.dim % 8 == 0;
    for (int64_t i = 0; i < dims - 1; ++i) {
      aligned &= tensor.size(i) == 1 || tensor.stride(i) % 8 == 0;
    }
    copies_ = !aligned && tensor.numel() > 0;
    if (copies_) offset_ = workspace.reserve(tensor.numel() / align_.dim * align_.stride * 2);
  }

  int64_t columns() const { return align_.stride; }

  // Makes the copy, and the view one of it.
  void finish(const Workspace& workspace, int sm_count, cudaStream_t stream) {
    if (!copies_) return;
    align_.copy = workspace.at<void>(offset_);
    attention_align(align_, sm_count, stream);
    view_.data = align_.copy;
    view_.head_stride = align_.stride;
    view_.token_stride = align_.heads * align_.stride;
    view_.batch_stride = view_.batch_stride == 0 ? 0 : align_.tokens * view_.token_stride;
  }

 private:
  TokenView& view_;
  AlignRows align_{};
  bool copies_;
  size_t offset_ = 0;
};

}  // namespace pumice::cuda
