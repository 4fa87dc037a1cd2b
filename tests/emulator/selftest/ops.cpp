// The schemas of the self-test operators. Every kernel writes into a tensor that it is given.
#include "selftest.h"

SELFTEST_LIBRARY(m) {
  // One instruction of csrc/cuda/ptx, with every lane's registers as tensors (probes.cu).
  m.def("mma(str type, Tensor a, Tensor b, Tensor(d!) d) -> ()");
  m.def("mma_sp(str type, int selector, Tensor a, Tensor b, Tensor metadata, Tensor(d!) d) -> ()");
  m.def("ldmatrix(Tensor bytes, Tensor rows, int count, bool transpose, Tensor(y!) y) -> ()");
  m.def("cp_async(Tensor x, Tensor valid, int size, Tensor(y!) y) -> ()");
  m.def("load_streaming(Tensor x, int size, Tensor(y!) y) -> ()");
  m.def("exp2(Tensor x, Tensor(y!) y) -> ()");
  m.def("e4m3(Tensor x, Tensor(y!) y) -> ()");
  m.def("store_16(Tensor x, Tensor(y!) y) -> ()");

  // Shuffles, votes, reductions, atomics and integer intrinsics (collectives.cu).
  m.def("collective(str name, Tensor x, Tensor operand, int width, Tensor(y!) y) -> ()");
  m.def("atomic(str name, Tensor x, Tensor(y!) y) -> ()");
  m.def("intrinsic(str name, Tensor a, Tensor b, Tensor c, Tensor(y!) y) -> ()");

  // y = a·b^T: int8 [M, K] and [N, K] into int32 [M, N] (gemm.cu).
  m.def("gemm(Tensor a, Tensor b, Tensor(y!) y) -> ()");

#ifdef PUMICE_EMULATED
  // A kernel with the fault of that name, or with the fault repaired (faults*.cu).
  m.def("fault(str name, bool repaired, Tensor x, Tensor(y!) y) -> ()");
#endif
}
