// The kernels of an emulated CUDA device: those of the CPU, on the memory of the device.
//
// A call fails as on a GPU if its tensors are on two devices. Where the host of a GPU would wait,
// there is the warning or the error of `torch.cuda.set_sync_debug_mode`. Kernels run at once and in
// order: races between streams, or of a host that reads a copy too early, do not show.
#include "device.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/copy_ops.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <unordered_map>
#include <unordered_set>

namespace {

// The host's view of the tensors of one call.
struct Call {
  explicit Call(std::string name = "copy_") : name(std::move(name)) {}

  Tensor to_host(const Tensor& device) {
    if (!device.defined()) return device;
    if (!device.is_cuda()) {
      if (device.dim() > 0 && !index_of_host) host_name = device.toString();
      return device;
    }
    if (!found) on = device.device();
    found = true;
    TORCH_CHECK(on == device.device(), "Expected all tensors to be on the same device, but found ",
                "at least two devices, ", on, " and ", device.device(), "! (", name, ")");
    auto* impl = device.unsafeGetTensorImpl();
    auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
    auto& host = host_of[storage];
    if (!host) {
      host = c10::Storage(c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), storage->nbytes(),
          c10::DataPtr(storage->mutable_data(), DeviceType::CPU), c10::GetCPUAllocator(), true));
      device_of[host.unsafeGetStorageImpl()] = impl->unsafe_storage();
      model_of[host.unsafeGetStorageImpl()] = device;
    }
    auto made = like(device, at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(host), c10::DispatchKeySet(c10::DispatchKey::CPU), device.dtype()));
    aliases.emplace_back(made, device);
    return made;
  }

  static Tensor like(const Tensor& model, Tensor made) {
    auto* impl = made.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(model.sizes(), model.strides(), model.storage_offset());
    if (model.is_conj()) impl->_set_conj(true);
    if (model.is_neg()) impl->_set_neg(true);
    if (model.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    return made;
  }

  void check() const {
    TORCH_CHECK(!found || host_name.empty(), "Expected all tensors to be on the same device, but ",
                "found at least two devices, ", on, " and cpu! (", name, ")");
  }

  // Tensors whose memory the kernel has replaced, as `out=` does.
  void write_back() {
    for (auto& [host, device] : aliases) {
      const auto& to = device.unsafeGetTensorImpl()->unsafe_storage();
      const auto& from = host.unsafeGetTensorImpl()->unsafe_storage();
      if (from.data() != to.data() && from.nbytes() > 0) {
        auto fresh = memory.allocate(from.nbytes());
        std::memcpy(fresh.get(), from.data(), from.nbytes());
        to.set_data_ptr(std::move(fresh));
        to.set_nbytes(from.nbytes());
      }
      if (host.sizes() != device.sizes() || host.strides() != device.strides() ||
          host.storage_offset() != device.storage_offset())
        device.unsafeGetTensorImpl()->set_sizes_and_strides(
            host.sizes(), host.strides(), host.storage_offset());
    }
  }

  Tensor to_device(const Tensor& host) {
    if (!host.defined() || !host.device().is_cpu()) return host;
    for (auto& [one, device] : aliases)
      if (one.is_same(host)) return device;
    auto* key = host.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
    auto& storage = device_of[key];
    if (!storage) {
      const auto& made = host.unsafeGetTensorImpl()->unsafe_storage();
      storage = c10::Storage(c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), made.nbytes(), on_device(made, on), &memory, true));
    }
    auto model = model_of.find(key);
    if (model == model_of.end())
      return like(host, at::detail::make_tensor<c10::TensorImpl>(
          c10::Storage(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), host.dtype()));
    // A view has the keys of its base: outside inference, it may be one of a tensor of inference.
    auto keys = model->second.key_set() -
                c10::DispatchKeySet({c10::DispatchKey::Conjugate, c10::DispatchKey::Negative});
    return like(host, at::detail::make_tensor<c10::TensorImpl>(
        c10::TensorImpl::VIEW, c10::Storage(storage), keys, host.dtype()));
  }

  IValue to_host(const IValue& value) {
    if (value.isTensor()) return to_host(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> made;
      for (const Tensor& one : value.toTensorVector()) made.push_back(to_host(one));
      return made;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> made;
      for (std::optional<Tensor> one : value.toOptionalTensorList())
        made.push_back(one.has_value() ? std::optional<Tensor>(to_host(*one)) : std::nullopt);
      return made;
    }
    if (value.isDevice()) {
      if (!found) on = value.toDevice().has_index() ? value.toDevice() : c10::Device(CUDA, current);
      found = true;
      return IValue(c10::Device(DeviceType::CPU));
    }
    if (value.isGenerator()) {
      auto given = value.toGenerator();
      TORCH_CHECK(given.device().is_cuda(), "Expected a 'cuda' device type for generator but ",
                  "found '", given.device(), "' (", name, ")");
      return IValue(static_cast<DeviceGenerator*>(given.unsafeGetGeneratorImpl())->host);
    }
    return value;
  }

  bool is_fresh(c10::StorageImpl* storage) const { return !host_of.count(storage); }

  IValue to_device(const IValue& value) {
    if (value.isTensor()) return to_device(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> made;
      for (const Tensor& one : value.toTensorVector()) made.push_back(to_device(one));
      return made;
    }
    return value;
  }

  std::string name;
  c10::Device on{CUDA, 0};
  bool found = false;
  bool index_of_host = false;
  std::string host_name;
  std::vector<std::pair<Tensor, Tensor>> aliases;
  std::unordered_map<c10::StorageImpl*, Tensor> model_of;
  std::unordered_map<c10::StorageImpl*, c10::Storage> host_of, device_of;
};

// The operations of a CUDA graph. As on a device, nothing is computed while they are recorded: what
// the kernels of the recording have written is written back at its end.
struct Graph {
  struct Recorded {
    c10::OperatorHandle op;
    torch::jit::Stack inputs, outputs;
  };
  std::vector<Recorded> operations;
  std::unordered_map<c10::StorageImpl*, std::pair<c10::Storage, std::string>> before;
  std::unordered_set<c10::StorageImpl*> own;
  std::vector<Tensor> alive;

  void note(const IValue& value, bool writes) {
    auto one = [&](const Tensor& tensor) {
      if (!tensor.defined() || !tensor.is_cuda()) return;
      const auto& storage = tensor.unsafeGetTensorImpl()->unsafe_storage();
      auto* key = storage.unsafeGetStorageImpl();
      if (writes && !own.count(key) && !before.count(key))
        before[key] = {storage, {static_cast<const char*>(storage.data()), storage.nbytes()}};
    };
    if (value.isTensor()) one(value.toTensor());
    if (value.isTensorList())
      for (const Tensor& tensor : value.toTensorVector()) one(tensor);
  }
  template <class C>
  void made(const IValue& value, const C& call) {
    auto one = [&](const Tensor& tensor) {
      if (!tensor.defined() || !tensor.is_cuda()) return;
      auto* key = tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
      for (auto& [_, device] : call.device_of)
        if (device.unsafeGetStorageImpl() == key && !call.is_fresh(key)) return;
      own.insert(key);
    };
    if (value.isTensor()) one(value.toTensor());
    if (value.isTensorList())
      for (const Tensor& tensor : value.toTensorVector()) one(tensor);
  }
  void end() {
    for (auto& [key, kept] : before)
      std::memcpy(kept.first.mutable_data(), kept.second.data(), kept.second.size());
    before.clear();
  }
};
std::vector<std::unique_ptr<Graph>> graphs;
thread_local Graph* recording = nullptr;

// Operations after which the host waits, since their result or its size depends on numbers.
const std::unordered_set<std::string> WAITS = {
    "aten::nonzero", "aten::masked_select", "aten::_unique", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::equal",
    "aten::_local_scalar_dense", "aten::bincount", "aten::multinomial", "aten::histc",
    "aten::linalg_eig", "aten::_linalg_eigh", "aten::_linalg_svd", "aten::linalg_lstsq"};

bool is_recording() { return recording != nullptr; }

void check_indices(const IValue& indices, bool device) {
  for (std::optional<Tensor> one : indices.toOptionalTensorList()) {
    if (!one.has_value() || !one->defined()) continue;
    bool mask = one->scalar_type() == at::kBool || one->scalar_type() == at::kByte;
    if (device && mask) synchronizes("an index by a mask");
    if (device && !one->is_cuda()) synchronizes("an index of the host");
    TORCH_CHECK(device || !one->is_cuda(), "indices should be either on cpu or on the same device ",
                "as the indexed tensor (cpu)");
  }
}

void on_host(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  const size_t count = schema.arguments().size(), begin = stack->size() - count;
  if (recording) {
    for (size_t i = 0; i < count; ++i) {
      auto* alias = schema.arguments()[i].alias_info();
      recording->note((*stack)[begin + i], alias && alias->isWrite());
    }
    recording->operations.push_back({op, {stack->begin() + begin, stack->end()}, {}});
  }
  const size_t place_of = recording ? recording->operations.size() - 1 : 0;
  if (WAITS.count(name)) synchronizes(name);
  if (name == "aten::repeat_interleave" && schema.overload_name() == "Tensor" &&
      (*stack)[begin + 1].isNone())
    synchronizes(name);
  Call call(name);
  {
    // Views of the CPU are neither tensors of inference nor known to autograd.
    c10::InferenceMode plain(false);
    at::AutoDispatchBelowADInplaceOrView below;
    bool index = name == "aten::index" || name == "aten::index_put" || name == "aten::index_put_" ||
                 name == "aten::_index_put_impl_";
    if (index) {
      for (size_t i = 0; i < count; ++i)
        if ((*stack)[begin + i].isOptionalTensorList())
          check_indices((*stack)[begin + i], (*stack)[begin].toTensor().is_cuda());
    }
    for (size_t i = 0; i < count; ++i) {
      call.index_of_host = index && i == 1;
      (*stack)[begin + i] = call.to_host((*stack)[begin + i]);
    }
    call.check();
    for (size_t i = 0; i < count; ++i)
      if ((*stack)[begin + i].isNone() && schema.arguments()[i].name() == "generator")
        (*stack)[begin + i] = host_generator(call.on.index());
    c10::DeviceGuard guard(call.on);
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  call.write_back();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i)
    (*stack)[i] = call.to_device((*stack)[i]);
  if (recording) {
    auto& outputs = recording->operations[place_of].outputs;
    outputs.assign(stack->end() - schema.returns().size(), stack->end());
    for (size_t i = 0; i < outputs.size(); ++i) recording->made(outputs[i], call);
  }
}

Tensor owned(Tensor made) {
  if (recording) {
    recording->own.insert(made.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl());
    recording->alive.push_back(made);
  }
  return made;
}

c10::Device place(std::optional<c10::Device> device) {
  return device && device->has_index() ? *device : c10::Device(CUDA, current);
}

Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype,
             std::optional<c10::Layout>, std::optional<c10::Device> device, std::optional<bool>,
             std::optional<c10::MemoryFormat> format) {
  c10::DeviceGuard guard(place(device));
  return owned(at::detail::empty_generic(
      size, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype),
      format));
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<c10::Layout>,
                     std::optional<c10::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(place(device));
  return owned(at::detail::empty_strided_generic(
      size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
      c10::dtype_or_default(dtype)));
}

Tensor& copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  if (self.is_cuda() != from.is_cuda() && !non_blocking && self.numel() > 0)
    synchronizes(self.is_cuda() ? "a copy to the device" : "a copy to the host");
  if (recording) {
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
    bool queued = from.is_cuda() || from.numel() == 0 || is_pinned(from.data_ptr());
    TORCH_CHECK(self.is_cuda() && queued,
                "operation not permitted when stream is capturing: a copy to or from the host");
    recording->note(self, true);
    recording->operations.push_back({op, {self, from, true}, {}});
  }
  Call here, there;
  c10::InferenceMode plain(false);
  at::AutoDispatchBelowADInplaceOrView below;
  auto to = self.is_cuda() ? here.to_host(self) : self;
  at::_ops::copy_::call(to, from.is_cuda() ? there.to_host(from) : from, false);
  return self;
}

void grow(const c10::Storage& storage, size_t bytes) {
  c10::DeviceGuard guard(storage.device());
  auto fresh = memory.allocate(bytes);
  if (storage.nbytes() > 0 && bytes > 0)
    std::memcpy(fresh.get(), storage.data(), std::min(bytes, storage.nbytes()));
  storage.set_data_ptr(std::move(fresh));
  storage.set_nbytes(bytes);
}

const Tensor& resize_(const Tensor& self, c10::IntArrayRef size,
                      std::optional<c10::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  if (self.sizes() == size) return self;
  impl->set_sizes_contiguous(size);
  size_t bytes = (self.storage_offset() + self.numel()) * self.element_size();
  if (bytes > impl->unsafe_storage().nbytes()) grow(impl->unsafe_storage(), bytes);
  return self;
}

Tensor& set_storage(Tensor& self, c10::Storage storage, int64_t offset, c10::IntArrayRef size,
                    c10::IntArrayRef stride) {
  TORCH_CHECK(storage.device() == self.device(), "set_: storage on ", storage.device(),
              ", tensor on ", self.device());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  if (stride.data() == nullptr || stride.size() != size.size()) {
    impl->set_storage_offset(offset);
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride, offset);
  }
  return self;
}
Tensor& set_tensor(Tensor& self, const Tensor& from) {
  return set_storage(self, from.storage(), from.storage_offset(), from.sizes(), from.strides());
}
Tensor& set_whole(Tensor& self, c10::Storage storage) {
  int64_t size = storage.nbytes() / self.element_size();
  return set_storage(self, std::move(storage), 0, {size}, {});
}
Tensor& set_empty(Tensor& self) {
  c10::DeviceGuard guard(self.device());
  return set_storage(self, c10::Storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), 0, memory.allocate(0), &memory, true)), 0, {0}, {});
}

void replay(Graph& graph) {
  c10::InferenceMode plain(false);
  at::AutoDispatchBelowADInplaceOrView below;
  for (auto& one : graph.operations) {
    torch::jit::Stack stack = one.inputs;
    one.op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CUDA), &stack);
    auto put = [](const Tensor& to, const Tensor& from) {
      if (!to.defined() || !to.is_cuda() || to.data_ptr() == from.data_ptr()) return;
      Call here, there;
      auto host = here.to_host(to);
      at::_ops::copy_::call(host, there.to_host(from), false);
    };
    for (size_t i = 0; i < one.outputs.size(); ++i) {
      if (one.outputs[i].isTensor()) put(one.outputs[i].toTensor(), stack[i].toTensor());
      if (one.outputs[i].isTensorList()) {
        auto to = one.outputs[i].toTensorVector(), from = stack[i].toTensorVector();
        for (size_t j = 0; j < to.size(); ++j) put(to[j], from[j]);
      }
    }
  }
}

// Flash attention and its kin have other rules than the kernels of the CPU.
int64_t no_fused_attention(const Tensor&, const Tensor&, const Tensor&,
                           const std::optional<Tensor>&, double, bool, std::optional<double>,
                           bool) {
  return 0;
}

}  // namespace

namespace at {
struct CUDAHooks : CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  int getNumGPUs() const override { return COUNT; }
  c10::DeviceIndex deviceCount() const override { return COUNT; }
  c10::DeviceIndex current_device() const override { return current; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex to) const override { current = to; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  Allocator* getCUDADeviceAllocator() const override { return &memory; }
  c10::Device getDeviceFromPtr(void*) const override { return {CUDA, current}; }
  const Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    return default_generator(index);
  }
  Generator getNewGenerator(c10::DeviceIndex index) const override {
    return make_generator<DeviceGenerator>(index < 0 ? current : index);
  }
  void deviceSynchronize(c10::DeviceIndex) const override { synchronizes("the device"); }
  std::string showConfig() const override { return "an emulated device"; }
};
// torch made its own hooks when it was imported. They have no fields, so ours take their place.
static_assert(sizeof(CUDAHooks) == sizeof(CUDAHooksInterface));
static const bool replaced = [] {
  new (const_cast<CUDAHooksInterface*>(&detail::getCUDAHooks())) CUDAHooks();
  return true;
}();
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_", set_empty);
  m.impl("_fused_sdp_choice", no_fused_attention);
  // Otherwise a loop of torch that reads the sizes of groups.
  m.impl("_grouped_mm", torch::CppFunction::makeFromBoxedFunction<&on_host>());
}

TORCH_LIBRARY(emulated_gpu, m) {
  m.def("sync_mode(int mode) -> int", [](int64_t mode) {
    return (int64_t)sync_mode.exchange(mode);
  });
  m.def("waits(str what) -> ()", [](std::string what) { synchronizes(what); });
  m.def("set_device(int index) -> ()", [](int64_t index) { current = index; });
  m.def("current_device() -> int", [] { return (int64_t)current; });
  m.def("begin_graph() -> int", [] {
    graphs.push_back(std::make_unique<Graph>());
    recording = graphs.back().get();
    return (int64_t)graphs.size() - 1;
  });
  m.def("end_graph() -> ()", [] {
    if (recording) recording->end();
    recording = nullptr;
  });
  m.def("replay(int graph) -> ()", [](int64_t graph) { replay(*graphs.at(graph)); });
  m.def("memory() -> int[]", [] { return std::vector<int64_t>{held.load(), peak.load()}; });
  m.def("reset_peak() -> ()", [] { peak = held.load(); });
  m.def("seed(int index, int seed) -> ()", [](int64_t index, int64_t seed) {
    host_generator(index).set_current_seed(seed);
  });
  m.def("get_rng_state(int index) -> Tensor", [](int64_t index) {
    return host_generator(index).get_state();
  });
  m.def("set_rng_state(Tensor state, int index) -> ()", [](const Tensor& state, int64_t index) {
    host_generator(index).set_state(state);
  });
  m.def("resize_storage(Tensor holder, int bytes) -> ()", [](const Tensor& holder, int64_t bytes) {
    grow(holder.storage(), bytes);
  });
}
