// Words for what went wrong.
#pragma once

#include <string>

namespace pumice::emulator {

// The error of the current launch, with the source lines that its program counters stand for.
std::string report(const void* kernel);

// Who waits for whom, once no thread of the block can go on.
std::string describe_deadlock();

// A source path from the repository's root on.
std::string shorten(const std::string& path);

std::string function_name(const void* function);

}  // namespace pumice::emulator
