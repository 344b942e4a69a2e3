// A PrivateUse1 device that owns memory, views and copies, and not one kernel that computes.
//
// Its memory is the host's, so whatever can address the host can compute on it. Copies and scalars are read through
// CPU tensors over the same storage; everything else is refused by torch itself, unless `set_fallback` says otherwise.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>

// Autocast: torch's own lists of what is cast to what

namespace at {  // the lists speak of its types by their bare names

#define LOWER_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FLOAT32_RESULT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(LOWER_PRECISION)
  AT_FORALL_FP32(FLOAT32)
  AT_FORALL_FP32_SET_OPT_DTYPE(FLOAT32_RESULT)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
  AT_FORALL_PROMOTE(PROMOTE)
}

}  // namespace at

namespace {

using at::Tensor;
constexpr auto BARE = c10::DeviceType::PrivateUse1;

c10::Device here() { return {BARE, 0}; }

// Memory

struct Allocator : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {  // alloc_cpu aligns to 64 bytes
    void* data = c10::alloc_cpu(bytes);
    return {data, data, &c10::free_cpu, here()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

struct PinnedAllocator : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    std::lock_guard<std::mutex> lock(mutex);
    pinned.insert(data);
    return {data, data, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  static bool holds(const void* data) {
    std::lock_guard<std::mutex> lock(mutex);
    return pinned.count(data) != 0;
  }

 private:
  static void release(void* data) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      pinned.erase(data);
    }
    c10::free_cpu(data);
  }
  inline static std::mutex mutex;
  inline static std::set<const void*> pinned;
};

Allocator allocator;
PinnedAllocator pinned_allocator;
REGISTER_ALLOCATOR(BARE, &allocator);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return BARE; }
  c10::Device exchangeDevice(c10::Device) const override { return here(); }
  c10::Device getDevice() const override { return here(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, here()); }
  c10::Stream getDefaultStream(c10::Device) const override { return getStream(here()); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool = false) const override { return getStream(here()); }
  c10::Stream getNewStream(c10::Device, int = 0) const override { return getStream(here()); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream(here()); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// A seed and how much of its stream is used up, which is all that a counter-based generator has to know.
struct Generator final : c10::GeneratorImpl {
  Generator() : GeneratorImpl(here(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}
  void set_current_seed(uint64_t value) override { seed_ = value, offset_ = 0; }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return seed_;
  }
  void set_offset(uint64_t value) override { offset_ = value; }
  uint64_t get_offset() const override { return offset_; }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    Tensor state = at::empty({2 * sizeof(uint64_t)}, at::kByte);
    auto* words = reinterpret_cast<uint64_t*>(state.data_ptr());
    words[0] = seed_, words[1] = offset_;
    return state.getIntrusivePtr();
  }
  void set_state(const c10::TensorImpl& state) override {
    at::detail::check_rng_state(state);
    TORCH_CHECK(state.numel() == 2 * sizeof(uint64_t), "a state of bare has 16 bytes, got ", state.numel());
    const auto* words = static_cast<const uint64_t*>(state.data());
    seed_ = words[0], offset_ = words[1];
  }
  static c10::DeviceType device_type() { return BARE; }

 private:
  Generator* clone_impl() const override {
    auto* copy = new Generator();
    copy->seed_ = seed_, copy->offset_ = offset_;
    return copy;
  }
  uint64_t seed_ = c10::default_rng_seed_val, offset_ = 0;
};

const at::Generator& default_generator() {
  static const at::Generator generator = at::make_generator<Generator>();
  return generator;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
  c10::Device getDeviceFromPtr(void*) const override { return here(); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* data) const override { return PinnedAllocator::holds(data); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto data = allocator.allocate(bytes);  // of no bytes too: torch's own would leave an empty storage on the CPU
    allocator.copy_data(data.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(bytes);
  }
};

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
             std::optional<at::Device>, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(c10::layout_or_default(layout) == at::kStrided, "bare has strided tensors only");
  TORCH_CHECK(!c10::pinned_memory_or_default(pin), "only memory of the CPU can be pinned");
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &allocator, keys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout> layout, std::optional<at::Device>, std::optional<bool> pin) {
  TORCH_CHECK(c10::layout_or_default(layout) == at::kStrided, "bare has strided tensors only");
  TORCH_CHECK(!c10::pinned_memory_or_default(pin), "only memory of the CPU can be pinned");
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &allocator, keys, c10::dtype_or_default(dtype));
}

Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}

void record_stream(Tensor&, at::Stream) {}

// Copies

std::atomic<bool> own_copies{true};

c10::Storage host_storage(const c10::Storage& storage) {
  c10::DataPtr data(const_cast<void*>(storage.data()), c10::Device(c10::kCPU));
  return {c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), nullptr, false};
}

// A CPU tensor over a storage; conj and neg bits stay, as whoever reads resolves them.
Tensor over(const Tensor& x, c10::Storage storage) {
  Tensor host = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                         x.dtype());
  host.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  host._set_conj(x.is_conj());
  host._set_neg(x.is_neg());
  return host;
}

Tensor on_host(const Tensor& x) { return x.is_cpu() ? x : over(x, host_storage(x.storage())); }

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  at::NoGradGuard no_grad;
  TORCH_CHECK((from.is_cpu() || from.is_privateuseone()) && (to.is_cpu() || to.is_privateuseone()),
              "bare copies to and from the CPU, not between ", from.device(), " and ", to.device());
  if (from.is_cpu() || to.is_cpu()) {
    on_host(to).copy_(on_host(from));
    return to;
  }
  TORCH_CHECK_NOT_IMPLEMENTED(own_copies, "aten::_copy_from between tensors on bare has no kernel: own_copies is off");
  const auto storage = host_storage(to.storage());  // of both where they share one: torch looks for overlaps by it
  over(to, storage).copy_(from.is_alias_of(to) ? over(from, storage) : on_host(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar_dense(const Tensor& self) { return at::_local_scalar_dense(on_host(self)); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("view_as_complex", TORCH_FN(at::native::view_as_complex));
  m.impl("view_as_real", TORCH_FN(at::native::view_as_real));
  m.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
  m.impl("set_.source_Storage", TORCH_FN(at::native::set_));
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("resize_", TORCH_FN(at::native::resize_));
  m.impl("record_stream", &record_stream);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
}

// These read conj and neg bits themselves; torch would resolve the bits by a copy first, which ends here again.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

// The fallback, which is not part of the device: it tells what the device still lacks

std::mutex counting;
std::map<std::string, int64_t> counts;

void count(const std::string& name) {
  std::lock_guard<std::mutex> lock(counting);
  ++counts[name];
}

std::string overload(const c10::OperatorHandle& op) {
  const auto& schema = op.schema();
  return schema.overload_name().empty() ? schema.name() : schema.name() + "." + schema.overload_name();
}

// A generator of the CPU at a place of its own in bare's stream.
at::Generator on_host(at::Generator given) {
  std::lock_guard<std::mutex> lock(given.mutex());
  const auto offset = given.get_offset();
  given.set_offset(offset + 4);
  return at::detail::createCPUGenerator(given.current_seed() + offset);
}

void count_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  count(overload(op));
  const auto& arguments = op.schema().arguments();
  const auto first = stack->size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& value = (*stack)[first + i];
    if (arguments[i].name() == "generator") {
      value = on_host(value.isGenerator() ? value.toGenerator() : default_generator());
    }
  }
  at::native::cpu_fallback(op, stack);
}

void refuse(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, overload(op), " has no kernel on bare");
}

Tensor on_bare(const Tensor& x) { return x.defined() ? x.to(here()) : x; }

// torch asks devices for these two by names that a CPU does not serve, so the boxed fallback cannot.
Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
                   int64_t groups) {
  count("aten::convolution_overrideable");
  const auto host_bias = bias && bias->defined() ? std::optional(on_host(*bias)) : std::nullopt;
  return on_bare(at::convolution(on_host(input), on_host(weight), host_bias, stride, padding, dilation, transposed,
                                 output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                                        at::IntArrayRef stride, at::IntArrayRef padding,
                                                        at::IntArrayRef dilation, bool transposed,
                                                        at::IntArrayRef output_padding, int64_t groups,
                                                        std::array<bool, 3> needed) {
  count("aten::convolution_backward_overrideable");
  const auto channels = transposed ? weight.size(1) * groups : weight.size(0);
  const auto [dx, dw, db] = at::convolution_backward(on_host(grad), on_host(input), on_host(weight), {{channels}}, stride,
                                                     padding, dilation, transposed, output_padding, groups, needed);
  return {on_bare(dx), on_bare(dw), on_bare(db)};
}

// As CUDA's, this takes integers, which the CPU's does not.
Tensor histc(const Tensor& self, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
  count("aten::histc");
  const auto host = on_host(self);
  const auto real = at::isIntegralType(self.scalar_type(), true) ? host.to(at::kDouble) : host;
  return on_bare(at::histc(real, bins, low, high).to(self.scalar_type()));
}

void set_fallback(const std::string& mode) {
  static std::unique_ptr<torch::Library> all, some;
  all.reset();
  some.reset();
  if (mode == "none") return;
  const auto make = [](const char* space) {
    return std::make_unique<torch::Library>(torch::Library::IMPL, space, c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  };
  all = make("_");
  if (mode == "raise") {
    all->fallback(torch::CppFunction::makeFromBoxedFunction<&refuse>());
    return;
  }
  TORCH_CHECK_VALUE(mode == "count", "a fallback is 'none', 'count' or 'raise', got '", mode, "'");
  all->fallback(torch::CppFunction::makeFromBoxedFunction<&count_on_host>());
  some = make("aten");
  some->impl("convolution_overrideable", &convolution);
  some->impl("convolution_backward_overrideable", &convolution_backward);
  some->impl("histc", &histc);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("default_generator", &default_generator);
  m.def("own_copies", [](bool on) { own_copies = on; });
  m.def("set_fallback", &set_fallback);
  m.def("counts", [] {
    std::lock_guard<std::mutex> lock(counting);
    return counts;
  });
  m.def("clear_counts", [] {
    std::lock_guard<std::mutex> lock(counting);
    counts.clear();
  });
}
