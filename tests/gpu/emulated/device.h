// The memory, generators and streams of an emulated CUDA device: all of them are the host's.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

using at::Tensor;
using c10::DeviceType;
using c10::IValue;

namespace {

constexpr auto CUDA = DeviceType::CUDA;
constexpr int COUNT = 8;
thread_local c10::DeviceIndex current = 0;

// What happens where the host would wait for the device. 0: nothing, 1: a warning, 2: an error.
std::atomic<int> sync_mode{0};

bool is_recording();
void synchronizes(const std::string& what) {
  TORCH_CHECK(!is_recording(), "operation not permitted when stream is capturing: ", what);
  int mode = sync_mode.load();
  if (mode == 1) TORCH_WARN("called a synchronizing CUDA operation: ", what);
  TORCH_CHECK(mode != 2, "called a synchronizing CUDA operation: ", what);
}

std::atomic<int64_t> held{0}, peak{0};  // bytes
void hold(int64_t bytes) {
  int64_t now = held += bytes, before = peak.load();
  while (now > before && !peak.compare_exchange_weak(before, now)) {
  }
}
// The CPU memory behind a tensor of the device.
struct Block {
  Block(c10::Storage storage) : storage(std::move(storage)), bytes(this->storage.nbytes()) {
    hold(bytes);
  }
  ~Block() { held -= bytes; }
  c10::Storage storage;
  int64_t bytes;
};
void release(void* block) { delete static_cast<Block*>(block); }
c10::DataPtr on_device(c10::Storage storage, c10::Device device) {
  auto* block = new Block(std::move(storage));
  return {block->storage.mutable_data(), block, &release, device};
}

struct Memory : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    c10::Storage storage(c10::make_intrusive<c10::StorageImpl>(
        c10::StorageImpl::use_byte_size_t(), bytes, c10::GetCPUAllocator(), false));
    // Memory of a device is not zero when it is new, and NaN shows where it is read too early.
    if (bytes) std::memset(storage.mutable_data(), 0xff, bytes);
    return on_device(std::move(storage), c10::Device(CUDA, current));
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
} memory;

std::mutex pinned_lock;
std::map<const char*, size_t> pinned;
void unpin(void* memory) {
  std::lock_guard<std::mutex> lock(pinned_lock);
  pinned.erase(static_cast<char*>(memory));
  c10::free_cpu(memory);
}
struct Pinned : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = c10::alloc_cpu(bytes + 1);
    std::lock_guard<std::mutex> lock(pinned_lock);
    pinned[static_cast<char*>(memory)] = bytes + 1;
    return {memory, memory, &unpin, c10::Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
} pinned_memory;
bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> lock(pinned_lock);
  auto after = pinned.upper_bound(static_cast<const char*>(data));
  if (after == pinned.begin()) return false;
  --after;
  return static_cast<const char*>(data) < after->first + after->second;
}

// A generator of the device: that of the CPU under another name.
struct DeviceGenerator : at::CPUGeneratorImpl {
  explicit DeviceGenerator(c10::DeviceIndex index, uint64_t seed = c10::default_rng_seed_val)
      : at::CPUGeneratorImpl(seed), host(at::make_generator<at::CPUGeneratorImpl>(seed)) {
    device_ = c10::Device(CUDA, index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::CUDA);
  }
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    host.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  at::CPUGeneratorImpl* clone_impl() const override {
    auto* copy = new DeviceGenerator(device_.index());
    copy->host = host.clone();
    return copy;
  }
  at::Generator host;
};

const at::Generator& default_generator(c10::DeviceIndex index) {
  static std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (int i = 0; i < COUNT; ++i) made.push_back(at::make_generator<DeviceGenerator>(i));
    return made;
  }();
  return all.at(index < 0 ? current : index);
}

at::Generator& host_generator(c10::DeviceIndex index) {
  return static_cast<DeviceGenerator*>(default_generator(index).unsafeGetGeneratorImpl())->host;
}

struct Guard : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return CUDA; }
  c10::Device exchangeDevice(c10::Device to) const override {
    c10::Device before(CUDA, current);
    setDevice(to);
    return before;
  }
  c10::Device getDevice() const override { return {CUDA, current}; }
  void setDevice(c10::Device to) const override { uncheckedSetDevice(to); }
  void uncheckedSetDevice(c10::Device to) const noexcept override {
    if (to.index() >= 0) current = to.index();
  }
  c10::Stream stream(c10::Device on) const {
    return c10::Stream(c10::Stream::DEFAULT, on.has_index() ? on : c10::Device(CUDA, current));
  }
  c10::Stream getStream(c10::Device on) const override { return stream(on); }
  c10::Stream getDefaultStream(c10::Device on) const override { return stream(on); }
  c10::Stream getStreamFromGlobalPool(c10::Device on, bool) const override { return stream(on); }
  c10::Stream getNewStream(c10::Device on, int) const override { return stream(on); }
  c10::Stream exchangeStream(c10::Stream to) const override { return stream(to.device()); }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  c10::DeviceIndex deviceCount() const noexcept override { return COUNT; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { synchronizes("a stream"); }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override { synchronizes("the device"); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace
