#include "shim.h"

#include "reserve.h"

#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>
#include <torch/csrc/jit/passes/inliner.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/csrc/jit/serialization/import.h>
#include <torch/script.h>

struct SensoriumModule {
  std::shared_ptr<sensorium::Reserve> reserve = std::make_shared<sensorium::Reserve>();
  torch::jit::Module module;
  at::Device device = at::kCPU;
  // Where it is on a GPU, that on which all of it runs.
  std::optional<c10::Stream> stream;
  std::vector<c10::Argument> arguments;
  std::vector<std::string> argument_types;
  c10::TypePtr result;
  std::string result_type;
  std::vector<std::string> fields;

  SensoriumModule() = default;
  SensoriumModule(const SensoriumModule&) = delete;
  SensoriumModule& operator=(const SensoriumModule&) = delete;
  ~SensoriumModule();
};

struct SensoriumTensor {
  at::Tensor tensor;
  // Texts, encoded; then `tensor` is undefined.
  std::string texts;
  std::vector<int64_t> sizes;
  std::string name;
  bool is_named = false;
};

namespace {

using sensorium::guarded;

// `body`, which uses a module. Where it fails on a GPU that does not even wait for what it was given any more, the process has
// lost that GPU: what CUDA calls a sticky error.
template <typename Body>
int guarded_on(const std::optional<c10::Stream>& stream, Body&& body) {
  const int status = guarded(std::forward<Body>(body));
  if (status == SENSORIUM_OK || !stream) return status;
  const bool is_there = guarded([&] { stream->synchronize(); }) == SENSORIUM_OK;
  return is_there ? status : SENSORIUM_LOST;
}

// Whether a part of it runs on threads of libtorch's own.
bool forks(const torch::jit::Block* block) {
  for (const torch::jit::Node* node : block->nodes()) {
    if (node->kind() == c10::prim::fork || node->kind() == c10::prim::awaitable) return true;
    for (const torch::jit::Block* inner : node->blocks()) {
      if (forks(inner)) return true;
    }
  }
  return false;
}

bool forks(const torch::jit::Method& method) {
  const auto graph = torch::jit::toGraphFunction(method.function()).graph()->copy();
  torch::jit::Inline(*graph);
  return forks(graph->block());
}

// Streams of GPUs for one module each: modules run side by side, where the stream that all share would put them in a row. They are
// used again, since libraries keep memory for each stream that they have ever been called on.
class Streams {
 public:
  static c10::Stream take(at::Device device) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (auto stream = free.begin(); stream != free.end(); ++stream) {
      if (stream->device() == device) {
        const c10::Stream taken = *stream;
        free.erase(stream);
        return taken;
      }
    }
    return c10::impl::VirtualGuardImpl(at::kCUDA).getStreamFromGlobalPool(device);
  }

  static void give_back(c10::Stream stream) {
    // The one that all share is nobody's.
    if (stream.id() == 0) return;
    const std::lock_guard<std::mutex> lock(mutex);
    // There are not so many that each module has one of its own: one that several have had is given back by each.
    if (std::find(free.begin(), free.end(), stream) == free.end()) free.push_back(stream);
  }

 private:
  inline static std::mutex mutex;
  inline static std::vector<c10::Stream> free;
};

// By SensoriumView::dtype.
constexpr at::ScalarType dtypes[] = {
    at::kBool,  at::kByte,   at::kUInt16,   at::kUInt32, at::kUInt64, at::kChar,  at::kShort,
    at::kInt,   at::kLong,   at::kHalf,     at::kBFloat16, at::kFloat, at::kDouble,
};
constexpr int32_t texts_dtype = sizeof(dtypes) / sizeof(dtypes[0]);

int32_t code(at::ScalarType type) {
  for (int32_t index = 0; index < texts_dtype; ++index) {
    if (dtypes[index] == type) return index;
  }
  TORCH_CHECK(false, "it gave a tensor of ", c10::toString(type), ", which the inference protocol has not");
}

// libtorch counts threads for each thread that calls it: its pool (OpenMP's) is a thread's own, too.
void use_threads(int threads) {
  thread_local int current = 0;
  if (current != threads) {
    // A thread's first look at the count takes over what any thread set last, so that comes before the thread's own.
    at::get_num_threads();
    at::set_num_threads(threads);
    current = threads;
  }
}

// Where libtorch_cpu.so lies, with a slash at the end; empty where that is not known.
std::string libtorch_folder() {
  std::string folder;
  if (void* const cpu = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD)) {
    struct link_map* map = nullptr;
    if (dlinfo(cpu, RTLD_DI_LINKMAP, &map) == 0) folder = map->l_name;
    dlclose(cpu);
  }
  const size_t end = folder.rfind('/');
  return end == std::string::npos ? "" : folder.substr(0, end + 1);
}

// libtorch's part for GPUs is a library that nothing here is linked with. It makes itself known when it is loaded, and stays for
// good.
void load_gpu_part() {
  static std::mutex mutex;
  static bool is_loaded = false;
  const std::lock_guard<std::mutex> lock(mutex);
  if (is_loaded) return;
  const std::string path = libtorch_folder() + "libtorch_cuda.so";
  TORCH_CHECK(dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) != nullptr, dlerror());
  is_loaded = true;
}

// libtorch asks for that part once, which may be in a run on the processor, and remembers that it was not there. So it is loaded
// before anything runs, where there is a driver for it. Who needs it is told what was wrong; others do not.
void look_for_gpu_part() {
  static const bool is_done = [] {
    if (dlopen("libcuda.so.1", RTLD_LAZY) != nullptr) guarded([] { load_gpu_part(); });
    return true;
  }();
  (void)is_done;
}

// The value without a question whether there is one.
c10::TypePtr bare(const c10::TypePtr& type) {
  if (const auto optional = type->cast<c10::OptionalType>()) return optional->getElementType();
  return type;
}

bool is_texts(const c10::TypePtr& type) {
  const auto list = type->cast<c10::ListType>();
  return list && list->getElementType()->kind() == c10::TypeKind::StringType;
}

int32_t argument_kind(const c10::TypePtr& type) {
  const auto inner = bare(type);
  switch (inner->kind()) {
    case c10::TypeKind::TensorType: return SENSORIUM_ARGUMENT_TENSOR;
    case c10::TypeKind::IntType: return SENSORIUM_ARGUMENT_INT;
    case c10::TypeKind::FloatType: return SENSORIUM_ARGUMENT_FLOAT;
    case c10::TypeKind::BoolType: return SENSORIUM_ARGUMENT_BOOL;
    default: return is_texts(inner) ? SENSORIUM_ARGUMENT_STRINGS : SENSORIUM_ARGUMENT_OTHER;
  }
}

// The inference protocol's texts: each after its length, four bytes, little-endian.
c10::List<std::string> decode(const SensoriumView& view) {
  c10::List<std::string> texts;
  size_t start = 0;
  while (start + 4 <= view.bytes) {
    uint32_t length = 0;
    std::memcpy(&length, view.data + start, 4);
    start += 4;
    TORCH_CHECK(length <= view.bytes - start, "a text goes past the end of its tensor");
    texts.push_back(std::string(reinterpret_cast<const char*>(view.data + start), length));
    start += length;
  }
  return texts;
}

void encode(SensoriumTensor& tensor, const c10::IValue& value) {
  const auto list = value.toList();
  for (const c10::IValue& element : list) {
    const std::string& text = element.toStringRef();
    const auto length = static_cast<uint32_t>(text.size());
    tensor.texts.append(reinterpret_cast<const char*>(&length), 4);
    tensor.texts.append(text);
  }
  tensor.sizes = {static_cast<int64_t>(list.size())};
}

// A copy: a module may keep its inputs or write to them, and the bytes are shared with other readers.
at::Tensor copied(const SensoriumView& view, at::Device device = at::kCPU) {
  TORCH_CHECK(view.dtype >= 0 && view.dtype < texts_dtype, "texts came for a tensor");
  const at::IntArrayRef sizes(view.sizes, view.dims);
  at::Tensor tensor = at::empty(sizes, at::TensorOptions().dtype(dtypes[view.dtype]).device(device));
  TORCH_CHECK(tensor.nbytes() == view.bytes, view.bytes, " bytes came for a tensor of ", tensor.nbytes());
  if (view.bytes == 0) return tensor;
  if (device.is_cpu()) {
    std::memcpy(tensor.mutable_data_ptr(), view.data, view.bytes);
  } else {
    // Read, and not written to; it waits until that is done.
    tensor.copy_(at::from_blob(const_cast<uint8_t*>(view.data), sizes, at::TensorOptions().dtype(dtypes[view.dtype])));
  }
  return tensor;
}

c10::IValue value_of(const SensoriumView& view, const c10::Argument& argument, at::Device device) {
  if (!view.is_there) return argument.default_value() ? *argument.default_value() : c10::IValue();
  switch (argument_kind(argument.type())) {
    case SENSORIUM_ARGUMENT_TENSOR: return copied(view, device);
    case SENSORIUM_ARGUMENT_INT: return copied(view).item<int64_t>();
    case SENSORIUM_ARGUMENT_FLOAT: return copied(view).item<double>();
    case SENSORIUM_ARGUMENT_BOOL: return copied(view).item<bool>();
    case SENSORIUM_ARGUMENT_STRINGS: return decode(view);
    default: TORCH_CHECK(false, "argument `", argument.name(), "` is no tensor");
  }
}

using Owned = std::vector<std::unique_ptr<SensoriumTensor>>;

void add(Owned& all, c10::IValue value, const std::string* name) {
  auto made = std::make_unique<SensoriumTensor>();
  if (name != nullptr) {
    made->name = *name;
    made->is_named = true;
  }
  if (value.isTensor()) {
    made->tensor = std::move(value).toTensor();
    TORCH_CHECK(made->tensor.defined(), "output ", all.size(), " is None, it must be a tensor or a list of texts");
  } else if (value.isList() && is_texts(value.type())) {
    encode(*made, value);
  } else {
    TORCH_CHECK(false, "output ", all.size(), " is ", value.tagKind(), ", it must be a tensor or a list of texts");
  }
  all.push_back(std::move(made));
}

Owned taken(c10::IValue result) {
  Owned all;
  if (result.isTuple()) {
    const auto elements = result.toTupleRef().elements().vec();
    result = c10::IValue();
    for (const auto& element : elements) add(all, element, nullptr);
  } else if (result.isGenericDict()) {
    for (const auto& entry : result.toGenericDict()) {
      TORCH_CHECK(entry.key().isString(), "its dict has keys that are no texts");
      add(all, entry.value(), &entry.key().toStringRef());
    }
  } else if (result.isTensorList() || (result.isList() && !is_texts(result.type()))) {
    const auto list = result.toList();
    for (const c10::IValue& element : list) add(all, element, nullptr);
  } else {
    add(all, std::move(result), nullptr);
  }
  return all;
}

// Bytes that a view may keep beside its own.
constexpr size_t view_slack = 16 << 10;

// Makes what a run gave readable for longer than until the next run: dense, and nobody's but the caller's. A module may
// keep what it returns, and write to it in its next run.
void settle(SensoriumTensor& made) {
  at::Tensor& tensor = made.tensor;
  if (!tensor.defined()) return;
  const bool is_dense = tensor.layout() == at::kStrided && !tensor.is_quantized() && !tensor.is_nested();
  TORCH_CHECK(is_dense, "it gave a tensor that is sparse, quantized, nested or in a layout of oneDNN's: return it .to_dense() or .dequantize()");
  tensor = tensor.cpu().resolve_conj().resolve_neg().contiguous();
  const bool is_shared = tensor.use_count() > 1 || tensor.storage().use_count() > 1;
  // Such as the last of many tokens: the others would stay for as long as its reader takes.
  const bool is_of_more = tensor.storage().nbytes() / 2 > tensor.nbytes() + view_slack;
  if (is_shared || is_of_more) tensor = tensor.clone();
  code(tensor.scalar_type());
}

}  // namespace

SensoriumModule::~SensoriumModule() {
  if (!stream) return;
  module = torch::jit::Module();
  // What a GPU's tensors leave stays with libtorch otherwise, out of reach of other libraries and processes. There is nobody who
  // could be told that it failed.
  guarded([&] {
    c10::getDeviceAllocator(at::kCUDA)->emptyCache();
    Streams::give_back(*stream);
  });
}

extern "C" {

const char* sensorium_torch_last_error() { return sensorium::last_error; }

int sensorium_torch_need_gpu(int index) {
  return guarded([&] {
    TORCH_CHECK(dlopen("libcuda.so.1", RTLD_LAZY) != nullptr, "there is no driver: ", dlerror());
    load_gpu_part();
    const auto count = c10::impl::hasDeviceGuardImpl(at::kCUDA) ? c10::impl::VirtualGuardImpl(at::kCUDA).deviceCount() : 0;
    TORCH_CHECK(count > 0, "libtorch finds no GPU: is the driver there, and is it new enough?");
    TORCH_CHECK(index >= 0 && index < count, "GPU ", index, " was asked for, and there are ", static_cast<int>(count), ", counted from 0");
    at::globalContext().lazyInitDevice(at::kCUDA);
  });
}

int sensorium_torch_load(const char* path, int gpu, SensoriumModule** out) {
  return guarded([&] {
    sensorium::ReservingAllocator::install();
    look_for_gpu_part();
    auto made = std::make_unique<SensoriumModule>();
    if (gpu >= 0) {
      made->device = at::Device(at::kCUDA, static_cast<at::DeviceIndex>(gpu));
      made->stream = Streams::take(made->device);
    }
    const c10::OptionalStreamGuard stream(made->stream);
    made->module = torch::jit::load(path, made->device);
    made->module.eval();
    const auto method = made->module.find_method("forward");
    TORCH_CHECK(method, "it has no method `forward`");
    if (made->stream && forks(*method)) {
      // Those threads know of no stream but the one that all share.
      made->stream->synchronize();
      Streams::give_back(*made->stream);
      made->stream = c10::impl::VirtualGuardImpl(at::kCUDA).getDefaultStream(made->device);
    }
    const auto& schema = method->function().getSchema();
    // The first is the module itself.
    for (size_t index = 1; index < schema.arguments().size(); ++index) {
      made->arguments.push_back(schema.arguments()[index]);
      made->argument_types.push_back(schema.arguments()[index].type()->annotation_str());
    }
    TORCH_CHECK(schema.returns().size() == 1, "its `forward` returns nothing");
    made->result = schema.returns()[0].type();
    made->result_type = made->result->annotation_str();
    if (const auto tuple = made->result->cast<c10::TupleType>()) {
      if (tuple->schema()) {
        for (const auto& field : tuple->schema()->arguments()) made->fields.push_back(field.name());
      }
    }
    *out = made.release();
  });
}

void sensorium_torch_free(SensoriumModule* module) { delete module; }

size_t sensorium_torch_argument_count(const SensoriumModule* module) { return module->arguments.size(); }

void sensorium_torch_argument(const SensoriumModule* module, size_t index, SensoriumArgument* out) {
  const auto& argument = module->arguments[index];
  out->kind = argument_kind(argument.type());
  out->may_lack = argument.default_value().has_value() || argument.type()->kind() == c10::TypeKind::OptionalType;
  out->name = argument.name().c_str();
  out->type = module->argument_types[index].c_str();
}

void sensorium_torch_result(const SensoriumModule* module, SensoriumResult* out) {
  const auto& type = module->result;
  out->count = 1;
  out->type = module->result_type.c_str();
  if (type->kind() == c10::TypeKind::TensorType || is_texts(type)) {
    out->kind = SENSORIUM_RESULT_ONE;
  } else if (const auto tuple = type->cast<c10::TupleType>()) {
    out->kind = SENSORIUM_RESULT_TUPLE;
    out->count = tuple->elements().size();
  } else if (type->kind() == c10::TypeKind::ListType) {
    out->kind = SENSORIUM_RESULT_LIST;
  } else if (type->kind() == c10::TypeKind::DictType) {
    out->kind = SENSORIUM_RESULT_DICT;
  } else {
    out->kind = SENSORIUM_RESULT_OTHER;
  }
}

const char* sensorium_torch_result_field(const SensoriumModule* module, size_t index) {
  return index < module->fields.size() ? module->fields[index].c_str() : nullptr;
}

int sensorium_torch_has_method(const SensoriumModule* module, const char* method) {
  bool found = false;
  const int status = guarded([&] {
    const auto named = module->module.find_method(method);
    found = named && named->function().getSchema().arguments().size() == 1;
  });
  return status == SENSORIUM_OK && found;
}

int sensorium_torch_run(
    SensoriumModule* module,
    const SensoriumView* inputs,
    size_t count,
    int threads,
    int optimize,
    SensoriumTensor** tensors,
    size_t capacity,
    size_t* found) {
  return guarded_on(module->stream, [&] {
    use_threads(threads);
    const sensorium::Using reserve(module->reserve);
    const c10::OptionalStreamGuard stream(module->stream);
    const c10::InferenceMode inference;
    const torch::jit::GraphOptimizerEnabledGuard optimizer(optimize != 0);
    TORCH_CHECK(count == module->arguments.size(), count, " inputs came, it takes ", module->arguments.size());
    std::vector<c10::IValue> values;
    values.reserve(count);
    for (size_t index = 0; index < count; ++index) {
      values.push_back(value_of(inputs[index], module->arguments[index], module->device));
    }
    Owned all = taken(module->module.forward(std::move(values)));
    TORCH_CHECK(all.size() <= capacity, "it gave ", all.size(), " outputs, ", capacity, " at most were expected");
    for (auto& made : all) settle(*made);
    *found = all.size();
    for (size_t index = 0; index < all.size(); ++index) tensors[index] = all[index].release();
  });
}

int sensorium_torch_call(SensoriumModule* module, const char* method, int threads, int optimize) {
  return guarded_on(module->stream, [&] {
    use_threads(threads);
    const sensorium::Using reserve(module->reserve);
    const c10::OptionalStreamGuard stream(module->stream);
    const c10::InferenceMode inference;
    const torch::jit::GraphOptimizerEnabledGuard optimizer(optimize != 0);
    module->module.get_method(method)(std::vector<c10::IValue>{});
    // What goes wrong on a GPU is this call's, not the next run's.
    if (module->stream) module->stream->synchronize();
  });
}

void sensorium_torch_view(const SensoriumTensor* tensor, SensoriumView* out) {
  out->is_there = 1;
  out->name = tensor->is_named ? tensor->name.c_str() : nullptr;
  if (tensor->tensor.defined()) {
    // `settle` has seen that it is one of these.
    for (int32_t index = 0; index < texts_dtype; ++index) {
      if (dtypes[index] == tensor->tensor.scalar_type()) out->dtype = index;
    }
    out->data = static_cast<const uint8_t*>(tensor->tensor.const_data_ptr());
    out->bytes = tensor->tensor.nbytes();
    out->sizes = tensor->tensor.sizes().data();
    out->dims = tensor->tensor.sizes().size();
  } else {
    out->dtype = texts_dtype;
    out->data = reinterpret_cast<const uint8_t*>(tensor->texts.data());
    out->bytes = tensor->texts.size();
    out->sizes = tensor->sizes.data();
    out->dims = tensor->sizes.size();
  }
}

void sensorium_torch_tensor_free(SensoriumTensor* tensor) { delete tensor; }

int sensorium_torch_threads() { return at::get_num_threads(); }

int sensorium_torch_compile(
    const char* source,
    const SensoriumAttribute* attributes,
    size_t count,
    const char* path) {
  return guarded([&] {
    torch::jit::Module module("__torch__.Module");
    for (size_t index = 0; index < count; ++index) {
      const SensoriumAttribute& attribute = attributes[index];
      if (attribute.module != nullptr) {
        module.register_module(attribute.name, torch::jit::load(attribute.module, at::Device(at::kCPU)));
      } else {
        module.register_attribute(attribute.name, c10::TensorType::get(), copied(attribute.tensor));
      }
    }
    module.define(source);
    module.save(path);
  });
}

}  // extern "C"
