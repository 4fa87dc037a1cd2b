// Warp collectives, atomic operations, integer intrinsics and what of csrc/cuda/ptx is like them.
#include <string>

#include "cuda/ptx/lop3.h"
#include "cuda/ptx/thread.h"
#include "selftest.h"

namespace pumice::cuda {
namespace {

enum class Collective {
  kShfl,
  kUp,
  kDown,
  kXor,
  kBallot,
  kAny,
  kAll,
  kAdd,
  kMin,
  kMax,
  kAnd,
  kOr,
  kXorSum
};

template <Collective kName>
__global__ void collective_probe(const int* x, const int* operand, int width, int* y) {
  const int lane = lane_index(), v = x[lane], o = operand[lane];
  int r = 0;
  if constexpr (kName == Collective::kShfl) r = __shfl_sync(kFullWarp, v, o, width);
  if constexpr (kName == Collective::kUp) r = __shfl_up_sync(kFullWarp, v, o, width);
  if constexpr (kName == Collective::kDown) r = __shfl_down_sync(kFullWarp, v, o, width);
  if constexpr (kName == Collective::kXor) r = __shfl_xor_sync(kFullWarp, v, o, width);
  if constexpr (kName == Collective::kBallot) r = static_cast<int>(__ballot_sync(kFullWarp, v));
  if constexpr (kName == Collective::kAny) r = __any_sync(kFullWarp, v);
  if constexpr (kName == Collective::kAll) r = __all_sync(kFullWarp, v);
  if constexpr (kName == Collective::kAdd) r = __reduce_add_sync(kFullWarp, v);
  if constexpr (kName == Collective::kMin) r = __reduce_min_sync(kFullWarp, v);
  if constexpr (kName == Collective::kMax) r = __reduce_max_sync(kFullWarp, v);
  const auto u = static_cast<unsigned>(v);
  if constexpr (kName == Collective::kAnd) r = static_cast<int>(__reduce_and_sync(kFullWarp, u));
  if constexpr (kName == Collective::kOr) r = static_cast<int>(__reduce_or_sync(kFullWarp, u));
  if constexpr (kName == Collective::kXorSum) r = static_cast<int>(__reduce_xor_sync(kFullWarp, u));
  y[lane] = r;
}

void collective(std::string name, const Tensor& x, const Tensor& operand, int64_t width,
                const Tensor& y) {
  const DeviceGuard guard(x);
  const auto run = [&](const char* its_name, auto kernel) {
    if (name != its_name) return;
    launch(kernel, 1, kWarpSize, 0, current_stream(x), read_pointer<int>(x),
           read_pointer<int>(operand), static_cast<int>(width), write_pointer<int>(y));
  };
  run("shfl", collective_probe<Collective::kShfl>);
  run("shfl_up", collective_probe<Collective::kUp>);
  run("shfl_down", collective_probe<Collective::kDown>);
  run("shfl_xor", collective_probe<Collective::kXor>);
  run("ballot", collective_probe<Collective::kBallot>);
  run("any", collective_probe<Collective::kAny>);
  run("all", collective_probe<Collective::kAll>);
  run("reduce_add", collective_probe<Collective::kAdd>);
  run("reduce_min", collective_probe<Collective::kMin>);
  run("reduce_max", collective_probe<Collective::kMax>);
  run("reduce_and", collective_probe<Collective::kAnd>);
  run("reduce_or", collective_probe<Collective::kOr>);
  run("reduce_xor", collective_probe<Collective::kXorSum>);
}

enum class Atomic { kAdd, kMax, kMin, kAnd, kOr, kXor };

// All threads of all blocks update y[0], and, in shared memory first, y[1].
template <Atomic kName>
__global__ void atomic_probe(const int* x, int* y) {
  auto* shared = dynamic_shared_memory<int>();
  const auto update = [](int* to, int v) {
    if constexpr (kName == Atomic::kAdd) atomicAdd(to, v);
    if constexpr (kName == Atomic::kMax) atomicMax(to, v);
    if constexpr (kName == Atomic::kMin) atomicMin(to, v);
    if constexpr (kName == Atomic::kAnd) atomicAnd(to, v);
    if constexpr (kName == Atomic::kOr) atomicOr(to, v);
    if constexpr (kName == Atomic::kXor) atomicXor(to, v);
  };
  const int v = x[blockIdx.x * blockDim.x + threadIdx.x];
  if (threadIdx.x == 0) *shared = v;
  __syncthreads();
  if (threadIdx.x != 0) update(shared, v);
  update(&y[0], v);
  __syncthreads();
  if (threadIdx.x == 0) update(&y[1], *shared);
}

void atomic(std::string name, const Tensor& x, const Tensor& y) {
  const DeviceGuard guard(x);
  const auto run = [&](const char* its_name, auto kernel) {
    if (name != its_name) return;
    launch(kernel, static_cast<unsigned>(x.numel() / 64), 64, sizeof(int), current_stream(x),
           read_pointer<int>(x), write_pointer<int>(y));
  };
  run("add", atomic_probe<Atomic::kAdd>);
  run("max", atomic_probe<Atomic::kMax>);
  run("min", atomic_probe<Atomic::kMin>);
  run("and", atomic_probe<Atomic::kAnd>);
  run("or", atomic_probe<Atomic::kOr>);
  run("xor", atomic_probe<Atomic::kXor>);
}

enum class Intrinsic {
  kBytePerm,
  kFunnelL,
  kFunnelR,
  kDp4a,
  kPopc,
  kClz,
  kFfs,
  kBrev,
  kToInt,
  kMulhi,
  kAndOr,
  kThread
};

template <Intrinsic kName>
__global__ void intrinsic_probe(const int* a, const int* b, const int* c, int n, int* y) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= n) return;
  const auto ua = static_cast<unsigned>(a[t]), ub = static_cast<unsigned>(b[t]),
             uc = static_cast<unsigned>(c[t]);
  int r = 0;
  if constexpr (kName == Intrinsic::kBytePerm) r = static_cast<int>(__byte_perm(ua, ub, uc));
  if constexpr (kName == Intrinsic::kFunnelL) r = static_cast<int>(__funnelshift_l(ua, ub, uc));
  if constexpr (kName == Intrinsic::kFunnelR) r = static_cast<int>(__funnelshift_r(ua, ub, uc));
  if constexpr (kName == Intrinsic::kDp4a) r = __dp4a(a[t], b[t], c[t]);
  if constexpr (kName == Intrinsic::kPopc) r = __popc(ua);
  if constexpr (kName == Intrinsic::kClz) r = __clz(a[t]);
  if constexpr (kName == Intrinsic::kFfs) r = __ffs(a[t]);
  if constexpr (kName == Intrinsic::kBrev) r = static_cast<int>(__brev(ua));
  if constexpr (kName == Intrinsic::kToInt) r = __float2int_rn(__int_as_float(a[t]));
  if constexpr (kName == Intrinsic::kMulhi) r = __mulhi(a[t], b[t]);
  if constexpr (kName == Intrinsic::kAndOr) r = static_cast<int>(ptx::and_or(ua, ub, uc));
  if constexpr (kName == Intrinsic::kThread) r = ptx::thread_index_here();
  y[t] = r;
}

void intrinsic(std::string name, const Tensor& a, const Tensor& b, const Tensor& c,
               const Tensor& y) {
  const DeviceGuard guard(a);
  const auto n = static_cast<int>(a.numel());
  const auto run = [&](const char* its_name, auto kernel) {
    if (name != its_name) return;
    launch(kernel, (n + 127) / 128, 128, 0, current_stream(a), read_pointer<int>(a),
           read_pointer<int>(b), read_pointer<int>(c), n, write_pointer<int>(y));
  };
  run("byte_perm", intrinsic_probe<Intrinsic::kBytePerm>);
  run("funnelshift_l", intrinsic_probe<Intrinsic::kFunnelL>);
  run("funnelshift_r", intrinsic_probe<Intrinsic::kFunnelR>);
  run("dp4a", intrinsic_probe<Intrinsic::kDp4a>);
  run("popc", intrinsic_probe<Intrinsic::kPopc>);
  run("clz", intrinsic_probe<Intrinsic::kClz>);
  run("ffs", intrinsic_probe<Intrinsic::kFfs>);
  run("brev", intrinsic_probe<Intrinsic::kBrev>);
  run("float2int_rn", intrinsic_probe<Intrinsic::kToInt>);
  run("mulhi", intrinsic_probe<Intrinsic::kMulhi>);
  run("and_or", intrinsic_probe<Intrinsic::kAndOr>);
  run("thread_index", intrinsic_probe<Intrinsic::kThread>);
}

}  // namespace
}  // namespace pumice::cuda

SELFTEST_IMPL(m) {
  m.impl("collective", TORCH_BOX(&pumice::cuda::collective));
  m.impl("atomic", TORCH_BOX(&pumice::cuda::atomic));
  m.impl("intrinsic", TORCH_BOX(&pumice::cuda::intrinsic));
}
