#include "emulator/report.h"

#include <dlfcn.h>

#include <cstdio>
#include <map>
#include <sstream>
#include <utility>
#include <vector>

#include "emulator/block.h"

namespace pumice::emulator {
namespace {

// The output lines of addr2line (binutils; without it a report lacks its source lines).
std::vector<std::string> symbolize(const void* pc, const char* options) {
  std::vector<std::string> lines;
  Dl_info library = {};
  if (!dladdr(pc, &library) || !library.dli_fname) return lines;
  std::ostringstream command;
  command << "addr2line " << options << " -e '" << library.dli_fname << "' 0x" << std::hex
          << (static_cast<const char*>(pc) - static_cast<const char*>(library.dli_fbase))
          << " 2>/dev/null";
  FILE* pipe = popen(command.str().c_str(), "r");
  if (!pipe) return lines;
  char text[1024];
  while (std::fgets(text, sizeof(text), pipe)) {
    std::string line(text);
    while (!line.empty() && line.back() == '\n') line.pop_back();
    lines.push_back(line);
  }
  pclose(pipe);
  return lines;
}

// "a.h:12, inlined at b.cu:34": from the innermost function outwards, the emulator's own left out.
std::string source_line(const void* pc) {
  std::string out;
  // A return address points behind the call.
  for (const std::string& line : symbolize(static_cast<const char*>(pc) - 1, "-i")) {
    const std::string place = shorten(line.substr(0, line.find(" (discriminator")));
    const bool own =
        place.rfind("tests/emulator/", 0) == 0 && place.rfind("tests/emulator/selftest/", 0) != 0;
    if (own || place.find("??") != std::string::npos) continue;
    out += (out.empty() ? "" : ", inlined at ") + place;
  }
  return out;
}

// "0-3, 7" for those of the block's threads whose numbers are given in ascending order.
std::string ranges(const std::vector<uint32_t>& numbers) {
  std::ostringstream out;
  for (size_t i = 0; i < numbers.size();) {
    size_t j = i;
    while (j + 1 < numbers.size() && numbers[j + 1] == numbers[j] + 1) ++j;
    out << (i ? ", " : "") << numbers[i];
    if (j > i) out << '-' << numbers[j];
    i = j + 1;
  }
  return out.str();
}

}  // namespace

std::string shorten(const std::string& path) {
  for (const std::string prefix : {PUMICE_SOURCE_ROOT, "./"}) {
    if (path.rfind(prefix, 0) == 0) return path.substr(prefix.size());
  }
  return path;
}

std::string describe_thread(uint32_t linear) {
  const Launch& launch = current_launch();
  const dim3 block = launch.block;
  const uint32_t t = linear % launch.threads;
  const uint3 b = block_index_of(linear / launch.threads);
  std::ostringstream out;
  out << "thread (" << t % block.x << ',' << t / block.x % block.y << ',' << t / (block.x * block.y)
      << ") of block (" << b.x << ',' << b.y << ',' << b.z << ')';
  return out.str();
}

std::string describe_deadlock() {
  Launch& launch = current_launch();
  std::map<std::pair<std::string, uint32_t>, std::vector<uint32_t>> waiting;
  std::vector<uint32_t> left;
  bool barrier = false, collective = false;
  for (const Thread& thread : launch.thread) {
    if (thread.done) {
      left.push_back(thread.linear);
      continue;
    }
    (thread.waiting_mask == 0 ? barrier : collective) = true;
    std::vector<uint32_t>& group = waiting[{thread.waiting_at, thread.waiting_mask}];
    if (group.empty()) launch.error_pcs.push_back(thread.waiting_pc);
    group.push_back(thread.linear);
  }
  std::ostringstream out;
  // Both kinds of waiting at once, or more than one collective, is a deadlock like any other.
  out << (barrier && !collective ? "divergent barrier: " : "deadlock: ") << "in block ("
      << launch.block_index.x << ',' << launch.block_index.y << ',' << launch.block_index.z << ')';
  for (const auto& [place, threads] : waiting) {
    out << ", threads " << ranges(threads) << " wait at " << place.first;
    if (place.second) out << " with mask 0x" << std::hex << place.second << std::dec;
  }
  if (!left.empty()) out << ", threads " << ranges(left) << " have left the kernel";
  return out.str();
}

std::string function_name(const void* function) {
  const std::vector<std::string> lines = symbolize(function, "-fC");
  return lines.empty() || lines[0].find("??") != std::string::npos ? "a kernel" : lines[0];
}

std::string report(const void* kernel) {
  const Launch& launch = current_launch();
  std::ostringstream out;
  out << "emulator: " << launch.error << "\n  in " << function_name(kernel);
  for (size_t i = 0; i < launch.error_pcs.size(); ++i) {
    const std::string line = source_line(launch.error_pcs[i]);
    if (!line.empty()) out << (i == 0 ? "\n  at " : "\n  and ") << line;
  }
  return out.str();
}

}  // namespace pumice::emulator
