// A guard and hooks of CUDA that do nothing, so that autograd works on tensors that pretend to be on a GPU, in a build of
// PyTorch for the CPU. Loaded before torch is.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using c10::Device;
using c10::Stream;
const Device ONE(c10::DeviceType::CUDA, 0);
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return ONE; }
  Device getDevice() const override { return ONE; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, ONE); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, ONE); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, ONE); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, ONE); }
  void record(void**, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};
}  // namespace
namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
}
