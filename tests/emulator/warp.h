// Warp collectives: shuffles, votes, reductions, and ldmatrix. Included by device.h.
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>

#include "emulator/runtime.h"

namespace pumice::emulator {

// A value that each lane gives, and one that it takes from a lane of its choice.
template <class T>
struct ShuffleArgument {
  T value;
  int source;
  T result;
};

// __shfl*_sync; every lane has worked out its source itself.
template <class T>
inline T shuffle(const char* name, uint32_t mask, T value, int source) {
  static_assert(
      std::is_trivially_copyable_v<T> && (sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8),
      "CUDA shuffles values of 2, 4 and 8 bytes");
  if (!(mask >> source & 1)) {
    kernel_error("divergent warp", "shuffles from a lane that its mask does not name");
  }
  ShuffleArgument<T> argument{value, source, value};
  warp_rendezvous(
      name, WarpRule::kNamedLanes, mask, &argument, [](void* const* lanes, uint32_t present) {
        for (int lane = 0; lane < 32; ++lane) {
          if (!(present >> lane & 1)) continue;
          auto& to = *static_cast<ShuffleArgument<T>*>(lanes[lane]);
          if (!(present >> to.source & 1)) {
            kernel_error("divergent warp",
                         "or a lane of its warp shuffles from a lane that has left the kernel");
          }
          to.result = static_cast<ShuffleArgument<T>*>(lanes[to.source])->value;
        }
      });
  return argument.result;
}

// Votes and reductions: every lane gets operation(... operation(v0, v1) ..., v31).
template <class T, class Operation>
inline T reduce(const char* name, uint32_t mask, T value, Operation) {
  ShuffleArgument<T> argument{value, 0, value};
  warp_rendezvous(name, WarpRule::kNamedLanes, mask, &argument,
                  [](void* const* lanes, uint32_t present) {
                    bool first = true;
                    T result{};
                    for (int lane = 0; lane < 32; ++lane) {
                      if (!(present >> lane & 1)) continue;
                      const T value = static_cast<ShuffleArgument<T>*>(lanes[lane])->value;
                      result = first ? value : Operation()(result, value);
                      first = false;
                    }
                    for (int lane = 0; lane < 32; ++lane) {
                      if (present >> lane & 1) {
                        static_cast<ShuffleArgument<T>*>(lanes[lane])->result = result;
                      }
                    }
                  });
  return argument.result;
}

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) +
                          static_cast<std::make_unsigned_t<T>>(b));
  }
};
struct Min {
  template <class T>
  T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Max {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
struct And {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a & b; }
};
struct Or {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a | b; }
};
struct Xor {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a ^ b; }
};

struct LdmatrixArgument {
  uint32_t row[4];  // what this lane's address points at, as four words
  uint32_t result[4];
};

template <int kCount, bool kTranspose>
inline void ldmatrix(std::array<uint32_t*, kCount> registers, const void* row) {
  LdmatrixArgument argument = {};
  // Each lane reads its row itself, so that the checker knows whose address was wrong.
  if (lane_id() < 8 * kCount) {
    check_shared_address("ldmatrix", row, 16);
    const uint4 words = *static_cast<const uint4*>(row);
    argument = {{words.x, words.y, words.z, words.w}, {}};
  }
  warp_rendezvous(kTranspose ? "ldmatrix.trans" : "ldmatrix", WarpRule::kAligned, 0xffffffffu,
                  &argument, [](void* const* lanes, uint32_t) {
                    const auto row_of = [lanes](int i) {
                      return static_cast<LdmatrixArgument*>(lanes[i])->row;
                    };
                    const auto element = [&row_of](int matrix, int i, int j) {
                      return row_of(8 * matrix + i)[j / 2] >> (j % 2 * 16) & 0xffffu;
                    };
                    for (int lane = 0; lane < 32; ++lane) {
                      const int i = lane / 4, j = lane % 4;
                      for (int m = 0; m < kCount; ++m) {
                        static_cast<LdmatrixArgument*>(lanes[lane])->result[m] =
                            kTranspose ? element(m, 2 * j, i) | element(m, 2 * j + 1, i) << 16
                                       : row_of(8 * m + i)[j];
                      }
                    }
                  });
  for (int m = 0; m < kCount; ++m) *registers[m] = argument.result[m];
}

// ld.global.nc: the caller's promise that nobody writes there is checked as any race is.
template <class T>
inline T load_read_only(const void* address) {
  return *static_cast<const T*>(address);
}

}  // namespace pumice::emulator

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = pumice::emulator::lane_id();
  return pumice::emulator::shuffle("__shfl_sync", mask, value,
                                   (lane & ~(width - 1)) | (source & (width - 1)));
}

template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = pumice::emulator::lane_id(), source = lane - static_cast<int>(delta);
  return pumice::emulator::shuffle("__shfl_up_sync", mask, value,
                                   source < (lane & ~(width - 1)) ? lane : source);
}

template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = pumice::emulator::lane_id(), source = lane + static_cast<int>(delta);
  return pumice::emulator::shuffle("__shfl_down_sync", mask, value,
                                   source > (lane | (width - 1)) ? lane : source);
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = pumice::emulator::lane_id(), source = lane ^ lane_mask;
  return pumice::emulator::shuffle("__shfl_xor_sync", mask, value,
                                   source > (lane | (width - 1)) ? lane : source);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint32_t bit = predicate ? 1u << pumice::emulator::lane_id() : 0;
  return pumice::emulator::reduce("__ballot_sync", mask, bit, pumice::emulator::Or());
}
inline int __any_sync(unsigned mask, int predicate) {
  return static_cast<int>(pumice::emulator::reduce("__any_sync", mask, uint32_t{predicate != 0},
                                                   pumice::emulator::Or()));
}
inline int __all_sync(unsigned mask, int predicate) {
  return static_cast<int>(pumice::emulator::reduce("__all_sync", mask, uint32_t{predicate != 0},
                                                   pumice::emulator::And()));
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return pumice::emulator::reduce("__reduce_add_sync", mask, value, pumice::emulator::Add());
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return pumice::emulator::reduce("__reduce_add_sync", mask, value, pumice::emulator::Add());
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return pumice::emulator::reduce("__reduce_min_sync", mask, value, pumice::emulator::Min());
}
inline int __reduce_min_sync(unsigned mask, int value) {
  return pumice::emulator::reduce("__reduce_min_sync", mask, value, pumice::emulator::Min());
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return pumice::emulator::reduce("__reduce_max_sync", mask, value, pumice::emulator::Max());
}
inline int __reduce_max_sync(unsigned mask, int value) {
  return pumice::emulator::reduce("__reduce_max_sync", mask, value, pumice::emulator::Max());
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return pumice::emulator::reduce("__reduce_and_sync", mask, value, pumice::emulator::And());
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return pumice::emulator::reduce("__reduce_or_sync", mask, value, pumice::emulator::Or());
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  return pumice::emulator::reduce("__reduce_xor_sync", mask, value, pumice::emulator::Xor());
}
