// The order in which unreferenced cached blocks will be taken: a list threaded through an array, so
// that any block leaves or moves in constant time and nothing is allocated.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pumice::kv {

class LruList {
 public:
  explicit LruList(int32_t blocks) : end_(blocks), links_(static_cast<size_t>(blocks) + 1) {
    links_[end_] = {end_, end_};
  }

  bool empty() const { return size_ == 0; }
  int32_t size() const { return size_; }
  bool contains(int32_t block) const { return links_[block].younger != kAbsent; }
  int32_t oldest() const { return links_[end_].younger; }

  void push_youngest(int32_t block) {
    const int32_t last = links_[end_].older;
    links_[block] = {last, end_};
    links_[last].younger = block;
    links_[end_].older = block;
    ++size_;
  }

  void remove(int32_t block) {
    const Link link = links_[block];
    links_[link.older].younger = link.younger;
    links_[link.younger].older = link.older;
    links_[block] = {};
    --size_;
  }

 private:
  static constexpr int32_t kAbsent = -1;
  struct Link {
    int32_t older = kAbsent, younger = kAbsent;
  };

  int32_t end_;  // a sentinel that closes the list to a ring
  int32_t size_ = 0;
  std::vector<Link> links_;
};

}  // namespace pumice::kv
