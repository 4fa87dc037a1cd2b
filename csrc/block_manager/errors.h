// What the block manager refuses, by name. Wrong arguments are std::invalid_argument.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace pumice::kv {

// The pool has fewer blocks than an operation needs. Nothing was changed.
class OutOfBlocks : public std::runtime_error {
 public:
  OutOfBlocks(const std::string& message, int64_t needed, int64_t available)
      : std::runtime_error(message), needed(needed), available(available) {}

  int64_t needed, available;
};

// No sequence has this id, now.
class UnknownSequence : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// free() of a sequence that was freed before.
class DoubleFree : public UnknownSequence {
 public:
  using UnknownSequence::UnknownSequence;
};

template <typename... Parts>
std::string message(const Parts&... parts) {
  std::string text;
  auto add = [&text](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>) {
      text += std::to_string(part);
    } else {
      text += part;
    }
  };
  (add(parts), ...);
  return text;
}

template <typename... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) throw std::invalid_argument(message(parts...));
}

}  // namespace pumice::kv
