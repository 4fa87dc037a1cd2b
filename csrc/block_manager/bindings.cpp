// The block manager in Python: integer arrays in, numpy arrays out.
//
// Every call copies its arguments, then lets go of the interpreter before it takes the manager's
// lock: a thread that waits for one lock never holds the other.
#include "block_manager/bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>

#include "block_manager/block_manager.h"
#include "block_manager/errors.h"

namespace py = pybind11;

namespace pumice::kv {
namespace {

using Integers = std::vector<int64_t>;

Integers integers(const char* name, const py::handle& object) {
  if (PyLong_CheckExact(object.ptr())) return {object.cast<int64_t>()};
  const py::array array = py::array::ensure(object);
  if (!array) {
    PyErr_Clear();
    throw py::type_error(message(name, " must be an array of integers"));
  }
  if (array.ndim() > 1) {
    throw py::value_error(
        message(name, " must be a vector, not of ", int64_t{array.ndim()}, " dimensions"));
  }
  if (array.size() == 0) return {};  // numpy calls an empty list an array of floats
  if (const char kind = array.dtype().kind(); kind != 'i' && kind != 'u') {
    throw py::type_error(
        message(name, " must be integers, not ", py::str(array.dtype()).cast<std::string>()));
  }
  const auto values = py::array_t<int64_t, py::array::c_style | py::array::forcecast>(array);
  return {values.data(), values.data() + values.size()};
}

std::optional<Integers> optional_integers(const char* name, const py::object& object) {
  if (object.is_none()) return std::nullopt;
  return integers(name, object);
}

std::vector<int32_t> token_ids(const py::handle& object) {
  const Integers values = integers("tokens", object);
  std::vector<int32_t> tokens;
  tokens.reserve(values.size());
  for (int64_t value : values) {
    if (value < 0 || value > INT32_MAX) {
      throw py::value_error(message("tokens must be in [0, 2^31), not ", value));
    }
    tokens.push_back(static_cast<int32_t>(value));
  }
  return tokens;
}

std::optional<std::vector<int32_t>> optional_tokens(const py::object& object) {
  if (object.is_none()) return std::nullopt;
  return token_ids(object);
}

// The vector's memory becomes the array's.
template <typename T>
py::array_t<T> array_of(std::vector<T>&& values, std::vector<py::ssize_t> shape) {
  auto owned = std::make_unique<std::vector<T>>(std::move(values));
  T* data = owned->data();
  py::capsule release(owned.release(), [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return py::array_t<T>(std::move(shape), data, release);
}

template <typename T>
py::array_t<T> array_of(std::vector<T>&& values) {
  const auto size = static_cast<py::ssize_t>(values.size());
  return array_of(std::move(values), {size});
}

py::tuple tuple_of(Step&& step) {
  const auto rows = static_cast<py::ssize_t>(step.seq_lens.size());
  const auto copies = static_cast<py::ssize_t>(step.copies.size() / 2);
  return py::make_tuple(array_of(std::move(step.slot_mapping)),
                        array_of(std::move(step.block_table), {rows, step.width}),
                        array_of(std::move(step.seq_lens)),
                        array_of(std::move(step.copies), {copies, 2}));
}

// Runs the call without the interpreter's lock.
template <typename Call>
auto released(Call call) {
  py::gil_scoped_release release;
  return call();
}

// The tokens of a prompt, kept alive, and the prompt that refers to them.
struct PromptArguments {
  PromptArguments(const py::object& tokens, int64_t num_tokens, int64_t extra_key,
                  std::optional<int64_t> limit)
      : tokens(optional_tokens(tokens)) {
    if (this->tokens) prompt.tokens = *this->tokens;
    prompt.num_tokens = num_tokens;
    prompt.extra_key = extra_key;
    if (limit) prompt.limit = *limit;
  }
  PromptArguments(const PromptArguments&) = delete;

  std::optional<std::vector<int32_t>> tokens;
  Prompt prompt;
};

py::dict dict_of(const Stats& stats) {
  py::dict d;
  d["num_blocks"] = stats.num_blocks;
  d["free_blocks"] = stats.free;
  d["cached_blocks"] = stats.cached;
  d["used_blocks"] = stats.used;
  d["shared_blocks"] = stats.shared;
  d["indexed_blocks"] = stats.indexed;
  d["sequences"] = stats.sequences;
  d["tokens"] = stats.tokens;
  d["stored_tokens"] = stats.stored_tokens;
  d["waste"] = stats.waste;
  d["evictions"] = stats.evictions;
  d["prompt_tokens"] = stats.prompt_tokens;
  d["prompt_hits"] = stats.prompt_hits;
  return d;
}

void bind_errors(py::module_& m) {
  using Type = py::gil_safe_call_once_and_store<py::object>;
  PYBIND11_CONSTINIT static Type out_of_blocks, unknown_sequence, double_free;
  const auto declare = [&m](Type& type, const char* name, const py::object& base, const char* doc) {
    type.call_once_and_store_result([&]() -> py::object {
      const std::string full_name = message("pumice.decode.", name);
      return py::reinterpret_steal<py::object>(
          PyErr_NewExceptionWithDoc(full_name.c_str(), doc, base.ptr(), nullptr));
    });
    m.attr(name) = type.get_stored();
  };
  const auto builtin = [](PyObject* type) { return py::reinterpret_borrow<py::object>(type); };
  declare(out_of_blocks, "OutOfBlocksError", builtin(PyExc_RuntimeError),
          "The pool has fewer blocks than were asked for; nothing was changed. Attributes: needed, "
          "available (blocks).");
  declare(unknown_sequence, "UnknownSequenceError", builtin(PyExc_LookupError),
          "No sequence has this id: it was never given out, or was freed.");
  declare(double_free, "DoubleFreeError", unknown_sequence.get_stored(),
          "free() of a sequence that was freed before, or is named twice.");
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const OutOfBlocks& e) {
      py::object error = out_of_blocks.get_stored()(e.what());
      error.attr("needed") = e.needed;
      error.attr("available") = e.available;
      PyErr_SetObject(out_of_blocks.get_stored().ptr(), error.ptr());
    } catch (const DoubleFree& e) {
      PyErr_SetString(double_free.get_stored().ptr(), e.what());
    } catch (const UnknownSequence& e) {
      PyErr_SetString(unknown_sequence.get_stored().ptr(), e.what());
    }
  });
}

}  // namespace

void bind(py::module_& m) {
  bind_errors(m);
  py::class_<BlockManager>(m, "BlockManager",
                           "The paged KV cache's bookkeeping; see pumice.decode.BlockManager.")
      .def(py::init([](int64_t num_blocks, int64_t block_size, bool prefix_caching,
                       double watermark, int64_t window_left, int64_t sink_tokens,
                       int64_t null_block, int64_t hash_bits) {
        return std::make_unique<BlockManager>(Options{num_blocks, block_size, prefix_caching,
                                                      watermark, window_left, sink_tokens,
                                                      null_block, hash_bits});
      }))
      .def("allocate",
           [](BlockManager& self, const py::object& tokens, int64_t num_tokens, int64_t extra_key,
              std::optional<int64_t> limit) {
             const PromptArguments arguments(tokens, num_tokens, extra_key, limit);
             Allocation a = released([&] { return self.allocate(arguments.prompt); });
             return py::make_tuple(a.id, a.num_tokens, a.cached_tokens,
                                   array_of(std::move(a.slot_mapping)));
           })
      .def("can_allocate",
           [](BlockManager& self, const py::object& tokens, int64_t num_tokens, int64_t extra_key,
              std::optional<int64_t> limit) {
             const PromptArguments arguments(tokens, num_tokens, extra_key, limit);
             return released([&] { return self.can_allocate(arguments.prompt); });
           })
      .def("match_prefix",
           [](BlockManager& self, const py::object& tokens, int64_t extra_key) {
             const std::vector<int32_t> ids = token_ids(tokens);
             return released([&] { return self.match_prefix(ids, extra_key); });
           })
      .def("fork",
           [](BlockManager& self, const py::object& parents) {
             const Integers ids = integers("parents", parents);
             return array_of(released([&] { return self.fork(ids); }));
           })
      .def("free",
           [](BlockManager& self, const py::object& ids_) {
             const Integers ids = integers("ids", ids_);
             released([&] { self.free(ids); });
           })
      .def("append",
           [](BlockManager& self, const py::object& ids_, const py::object& tokens_,
              const py::object& counts_, std::optional<int64_t> width) {
             const Integers ids = integers("ids", ids_);
             const auto counts = optional_integers("counts", counts_);
             const auto tokens = optional_tokens(tokens_);
             return tuple_of(
                 released([&] { return self.append(ids, counts, tokens, width.value_or(-1)); }));
           })
      .def("can_append",
           [](BlockManager& self, const py::object& ids_, const py::object& counts_) {
             const Integers ids = integers("ids", ids_);
             const auto counts = optional_integers("counts", counts_);
             return released([&] { return self.can_append(ids, counts); });
           })
      .def("view",
           [](BlockManager& self, const py::object& ids_, const py::object& counts_,
              std::optional<int64_t> width) {
             const Integers ids = integers("ids", ids_);
             const auto counts = optional_integers("counts", counts_);
             return tuple_of(released([&] { return self.view(ids, counts, width.value_or(-1)); }));
           })
      .def("commit",
           [](BlockManager& self, const py::object& ids_, const py::object& lengths_) {
             const Integers ids = integers("ids", ids_);
             const auto lengths = optional_integers("lengths", lengths_);
             released([&] { self.commit(ids, lengths); });
           })
      .def("truncate",
           [](BlockManager& self, const py::object& ids_, const py::object& lengths_) {
             const Integers ids = integers("ids", ids_);
             const Integers lengths = integers("lengths", lengths_);
             released([&] { self.truncate(ids, lengths); });
           })
      .def("clear_cache", &BlockManager::clear_cache, py::call_guard<py::gil_scoped_release>())
      .def("stats",
           [](BlockManager& self) { return dict_of(released([&] { return self.stats(); })); })
      .def("block_table",
           [](BlockManager& self, int64_t id) {
             return array_of(released([&] { return self.block_table(id); }));
           })
      .def("block_tokens",
           [](BlockManager& self, int64_t block) {
             return array_of(released([&] { return self.block_tokens(block); }));
           })
      .def("num_tokens", &BlockManager::num_tokens, py::call_guard<py::gil_scoped_release>())
      .def("ref_count", &BlockManager::references, py::call_guard<py::gil_scoped_release>())
      .def("available_blocks", &BlockManager::available_blocks,
           py::call_guard<py::gil_scoped_release>())
      .def("watermark_blocks", &BlockManager::watermark_blocks)
      .def("usable_blocks", &BlockManager::usable_blocks);
}

}  // namespace pumice::kv
