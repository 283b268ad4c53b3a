// A CUDA runtime for a machine without a GPU: what nvcc's host code and our launchers call, with
// the answers and the refusals of the real one. Linked in place of libcudart.
//
// Memory is the caller's: a device pointer is an address of this process. A launch runs the
// kernel's PTX in the engine before it returns, in the order of the calls, whatever the stream.
//
// Every call that would cost something on a GPU is written down: launches with their parameters,
// copies, allocations, waits. Tests read the list, and run its launches again. While a stream is
// captured (emulated_capture), launches on it are written down only, as in a CUDA graph.
//
// Functions named emulated_... are for the tests. For one thread at a time.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine.h"

namespace {

// ---- the device ---------------------------------------------------------------------------

// What tests may change: field by field the array of emulated_device_set.
struct Device {
  int capability = 90;  // 90 for 9.0
  int multiprocessors = 4;
  int shared_of_block = 227 * 1024;  // most that a block may opt in to
  int shared_of_processor = 228 * 1024;
  int driver_version = 13000;  // as cudaDriverGetVersion reports it; 0: no driver
  int count = 1;
};

constexpr int SHARED_WITHOUT_ASKING = 48 * 1024;
constexpr int SHARED_RESERVED = 1024;  // of each block, by the system
constexpr int MAX_THREADS = 1024;
constexpr int REGISTERS = 64 * 1024;

int threads_of_processor(int capability) {
  if (capability < 80) return 1024;
  return capability == 80 || (capability >= 90 && capability < 120) ? 2048 : 1536;
}

int blocks_of_processor(int capability) {
  if (capability < 80 || capability == 86) return 16;
  return capability == 89 || capability >= 120 ? 24 : 32;
}

// ---- kernels ------------------------------------------------------------------------------

// The code of one translation unit, as nvcc packs it into the host object.
struct Binary {
  std::vector<int> ptx, machine_code;  // architectures, 90 for sm_90

  // Machine code runs on its own major version, from its minor version on; PTX on all later GPUs.
  bool runs_on(int capability) const {
    return std::any_of(ptx.begin(), ptx.end(), [&](int a) { return a <= capability; }) ||
           std::any_of(machine_code.begin(), machine_code.end(),
                       [&](int a) { return a / 10 == capability / 10 && a <= capability; });
  }
};

struct Kernel {
  std::string name;  // mangled, as in the PTX
  const Binary* binary;
  int max_dynamic_shared = SHARED_WITHOUT_ASKING;
};

template <class T>
T read(const char* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// The wrapper holds {magic, version, data}; data is {magic, u16 version, u16 header bytes, u64
// bytes} and entries {u16 kind, u16 version, u32 header bytes, u64 bytes, .., u32 architecture}.
Binary parse_fat_binary(const void* wrapper) {
  Binary binary;
  const char* at = read<const char*>(static_cast<const char*>(wrapper) + 8);
  const auto header = read<uint16_t>(at + 6);
  const char* end = at + header + read<uint64_t>(at + 8);
  for (at += header; at < end; at += read<uint32_t>(at + 4) + read<uint64_t>(at + 8)) {
    const auto kind = read<uint16_t>(at);
    (kind == 1 ? binary.ptx : binary.machine_code).push_back(read<int32_t>(at + 28));
  }
  return binary;
}

// ---- the list of calls --------------------------------------------------------------------

struct Shape {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

struct Call {
  std::string name;  // of the kernel, or of the runtime's function
  bool is_launch = false;
  bool captured = false;
  Shape shape{};
  std::vector<std::vector<char>> params;
};

struct Event {
  uint64_t number;  // of launches before it
};

struct Runtime {
  Device device;
  std::map<const void*, Kernel> kernels;  // by the host's function
  std::vector<std::unique_ptr<Binary>> binaries;
  std::vector<Call> calls;
  std::map<void*, size_t> allocations;
  bool capturing = false;
  cudaStream_t captured_stream = nullptr;
  uint64_t launches = 0;
  std::string detail;  // why the last launch failed
  int (*load)(const char* kernel) = nullptr;
};

// Registrations run before main, in any order.
Runtime& runtime() {
  static Runtime instance;
  return instance;
}

thread_local std::vector<Shape> pushed;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t failure(cudaError_t error, std::string detail) {
  runtime().detail = std::move(detail);
  return result(error);
}

// What every call finds out first.
cudaError_t device_error() {
  const Device& device = runtime().device;
  if (device.driver_version / 1000 < CUDART_VERSION / 1000) return cudaErrorInsufficientDriver;
  return device.count == 0 ? cudaErrorNoDevice : cudaSuccess;
}

void write_down(const char* name) {
  Call call;
  call.name = name;
  runtime().calls.push_back(std::move(call));
}

// For calls that must not happen while a graph is captured.
cudaError_t outside_capture(const char* name) {
  if (const cudaError_t error = device_error()) return result(error);
  write_down(name);
  return runtime().capturing ? failure(cudaErrorStreamCaptureUnsupported, name) : cudaSuccess;
}

// ---- launching ----------------------------------------------------------------------------

Kernel* find_kernel(const void* function) {
  const auto found = runtime().kernels.find(function);
  return found == runtime().kernels.end() ? nullptr : &found->second;
}

// The engine's knowledge of a kernel, loaded on first use.
const EmuKernelInfo* program_of(const std::string& name) {
  if (const EmuKernelInfo* info = emu_kernel_info(name.c_str())) return info;
  const auto load = runtime().load;
  if (!load || load(name.c_str()) != 0) return nullptr;
  return emu_kernel_info(name.c_str());
}

// The kernel's program, or null and the error that the real runtime would give.
const EmuKernelInfo* usable_program(const Kernel* kernel, cudaError_t* error) {
  *error = device_error();
  if (*error) return nullptr;
  if (!kernel) {
    *error = failure(cudaErrorInvalidDeviceFunction, "not a kernel of this library");
    return nullptr;
  }
  if (!kernel->binary->runs_on(runtime().device.capability)) {
    *error = failure(cudaErrorNoKernelImageForDevice, kernel->name);
    return nullptr;
  }
  const EmuKernelInfo* info = program_of(kernel->name);
  if (!info)
    *error = failure(cudaErrorInvalidDeviceFunction,
                     "no PTX for " + kernel->name + ", or it was refused: " + emu_error());
  return info;
}

cudaError_t check_shape(const Kernel& kernel, const EmuKernelInfo& info, const Shape& s) {
  const Device& device = runtime().device;
  const auto refuse = [&](cudaError_t error, const char* what, uint64_t size) {
    return failure(error, kernel.name + ": " + what + " " + std::to_string(size));
  };
  for (const unsigned n : {s.grid.x, s.grid.y, s.grid.z, s.block.x, s.block.y, s.block.z})
    if (n == 0) return refuse(cudaErrorInvalidConfiguration, "a grid or block of", 0);
  if (s.grid.x > INT32_MAX) return refuse(cudaErrorInvalidConfiguration, "grid.x", s.grid.x);
  for (const unsigned n : {s.grid.y, s.grid.z})
    if (n > 65535) return refuse(cudaErrorInvalidConfiguration, "grid.y or .z", n);
  for (const unsigned n : {s.block.x, s.block.y})
    if (n > MAX_THREADS) return refuse(cudaErrorInvalidConfiguration, "block.x or .y", n);
  if (s.block.z > 64) return refuse(cudaErrorInvalidConfiguration, "block.z", s.block.z);
  const uint64_t threads = uint64_t(s.block.x) * s.block.y * s.block.z;
  if (threads > MAX_THREADS) return refuse(cudaErrorInvalidConfiguration, "threads", threads);
  if (info.max_threads && threads > uint64_t(info.max_threads))
    return refuse(cudaErrorInvalidValue, "more threads than its launch bounds:", threads);
  if (s.shared > uint64_t(kernel.max_dynamic_shared))
    return refuse(cudaErrorInvalidValue, "dynamic shared memory without the attribute:", s.shared);
  if (s.shared + info.static_shared > uint64_t(device.shared_of_block))
    return refuse(cudaErrorInvalidValue, "shared memory", s.shared + info.static_shared);
  return cudaSuccess;
}

cudaError_t run(const std::string& name, const Shape& s, void** params) {
  ++runtime().launches;
  const unsigned grid[3] = {s.grid.x, s.grid.y, s.grid.z};
  const unsigned block[3] = {s.block.x, s.block.y, s.block.z};
  if (emu_launch(name.c_str(), grid, block, unsigned(s.shared), params) == 0) return cudaSuccess;
  return failure(cudaErrorLaunchFailure, name + ": " + emu_error());
}

cudaError_t launch(const void* function, const Shape& shape, void** params) {
  const Kernel* kernel = find_kernel(function);
  cudaError_t error;
  const EmuKernelInfo* info = usable_program(kernel, &error);
  if (!info) return result(error);
  if ((error = check_shape(*kernel, *info, shape))) return error;

  Call call;
  call.name = kernel->name;
  call.is_launch = true;
  call.captured = runtime().capturing && shape.stream == runtime().captured_stream;
  call.shape = shape;
  for (int i = 0; i < info->num_params; ++i) {
    const char* value = static_cast<const char*>(params[i]);
    call.params.emplace_back(value, value + info->param_bytes[i]);
  }
  const bool captured = call.captured;
  runtime().calls.push_back(std::move(call));
  return captured ? cudaSuccess : run(kernel->name, shape, params);
}

// ---- messages -----------------------------------------------------------------------------

struct Message {
  cudaError_t error;
  const char *name, *text;
};

constexpr Message MESSAGES[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
     "invalid configuration argument"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
};

const Message* message_of(cudaError_t error) {
  for (const Message& message : MESSAGES)
    if (message.error == error) return &message;
  return nullptr;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// ---- what nvcc writes into host code ------------------------------------------------------

void** __cudaRegisterFatBinary(void* wrapper) {
  auto& binaries = runtime().binaries;
  binaries.push_back(std::make_unique<Binary>(parse_fat_binary(wrapper)));
  return reinterpret_cast<void**>(binaries.back().get());
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void** binary, const char* function, char*, const char* name, int,
                            uint3*, uint3*, dim3*, dim3*, int*) {
  Kernel kernel;
  kernel.name = name;
  kernel.binary = reinterpret_cast<const Binary*>(binary);
  runtime().kernels[function] = std::move(kernel);
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  pushed.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Shape shape = pushed.back();
  pushed.pop_back();
  *grid = shape.grid;
  *block = shape.block;
  *shared = shape.shared;
  *static_cast<cudaStream_t*>(stream) = shape.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

// ---- launches -----------------------------------------------------------------------------

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** params,
                             size_t shared, cudaStream_t stream) {
  return launch(function, {grid, block, shared, stream}, params);
}

cudaError_t cudaLaunchKernel_ptsz(const void* function, dim3 grid, dim3 block, void** params,
                                  size_t shared, cudaStream_t stream) {
  return launch(function, {grid, block, shared, stream}, params);
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** params,
                               size_t shared, cudaStream_t stream) {
  return launch(kernel, {grid, block, shared, stream}, params);
}

cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel, dim3 grid, dim3 block, void** params,
                                    size_t shared, cudaStream_t stream) {
  return launch(kernel, {grid, block, shared, stream}, params);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  Kernel* kernel = find_kernel(function);
  cudaError_t error;
  const EmuKernelInfo* info = usable_program(kernel, &error);
  if (!info) return result(error);
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout)
    return value >= -1 && value <= 100 ? cudaSuccess : result(cudaErrorInvalidValue);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
    return result(cudaErrorInvalidValue);
  if (value < 0 || value + info->static_shared > runtime().device.shared_of_block)
    return failure(cudaErrorInvalidValue,
                   kernel->name + ": dynamic shared memory " + std::to_string(value));
  kernel->max_dynamic_shared = value;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  const Kernel* kernel = find_kernel(function);
  cudaError_t error;
  const EmuKernelInfo* info = usable_program(kernel, &error);
  if (!info) return result(error);
  *attributes = {};
  attributes->sharedSizeBytes = info->static_shared;
  attributes->maxThreadsPerBlock = info->max_threads ? info->max_threads : MAX_THREADS;
  attributes->maxDynamicSharedSizeBytes = kernel->max_dynamic_shared;
  for (const int architecture : kernel->binary->ptx)
    if (architecture <= runtime().device.capability)
      attributes->ptxVersion = std::max(attributes->ptxVersion, architecture);
  attributes->binaryVersion = runtime().device.capability;
  return cudaSuccess;
}

// Registers are not known here: threads, blocks and shared memory decide.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks,
                                                                   const void* function,
                                                                   int block_size, size_t shared,
                                                                   unsigned) {
  cudaError_t error;
  const EmuKernelInfo* info = usable_program(find_kernel(function), &error);
  if (!info) return result(error);
  if (block_size <= 0) return result(cudaErrorInvalidValue);
  const Device& device = runtime().device;
  const auto bytes = int64_t(shared) + info->static_shared + SHARED_RESERVED;
  *blocks = int(std::min<int64_t>({threads_of_processor(device.capability) / block_size,
                                   blocks_of_processor(device.capability),
                                   device.shared_of_processor / bytes}));
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function,
                                                          int block_size, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, block_size,
                                                                shared, 0);
}

// ---- device and versions ------------------------------------------------------------------

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = runtime().device.driver_version;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 0;
  if (const cudaError_t error = device_error()) return result(error);
  *count = runtime().device.count;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  if (const cudaError_t error = device_error()) return result(error);
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (const cudaError_t error = device_error()) return result(error);
  return device == 0 ? cudaSuccess : result(cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (const cudaError_t error = device_error()) return result(error);
  const Device& d = runtime().device;
  if (device < 0 || device >= d.count) return result(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = d.capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = d.capability % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = d.multiprocessors; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = SHARED_WITHOUT_ASKING; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = d.shared_of_block; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = d.shared_of_processor; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = SHARED_RESERVED; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = MAX_THREADS; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = threads_of_processor(d.capability); break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = blocks_of_processor(d.capability); break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = REGISTERS; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    default: return failure(cudaErrorInvalidValue, "an attribute that is not emulated");
  }
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (const cudaError_t error = device_error()) return result(error);
  const Device& d = runtime().device;
  if (device < 0 || device >= d.count) return result(cudaErrorInvalidDevice);
  *properties = {};
  std::strncpy(properties->name, "emulated GPU", sizeof properties->name - 1);
  properties->major = d.capability / 10;
  properties->minor = d.capability % 10;
  properties->multiProcessorCount = d.multiprocessors;
  properties->sharedMemPerBlock = SHARED_WITHOUT_ASKING;
  properties->sharedMemPerBlockOptin = d.shared_of_block;
  properties->sharedMemPerMultiprocessor = d.shared_of_processor;
  properties->reservedSharedMemPerBlock = SHARED_RESERVED;
  properties->maxThreadsPerBlock = MAX_THREADS;
  properties->maxThreadsPerMultiProcessor = threads_of_processor(d.capability);
  properties->maxBlocksPerMultiProcessor = blocks_of_processor(d.capability);
  properties->regsPerBlock = properties->regsPerMultiprocessor = REGISTERS;
  properties->warpSize = 32;
  return cudaSuccess;
}

// ---- errors -------------------------------------------------------------------------------

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(cudaError_t error) {
  const Message* message = message_of(error);
  return message ? message->name : "unrecognized error code";
}

// The real text; for a launch with what the emulation knows beyond it.
const char* cudaGetErrorString(cudaError_t error) {
  static std::string text;
  const Message* message = message_of(error);
  text = message ? message->text : "unrecognized error code";
  if (error != cudaSuccess && !runtime().detail.empty()) text += " [" + runtime().detail + "]";
  return text.c_str();
}

// ---- memory, streams, events --------------------------------------------------------------

cudaError_t cudaMalloc(void** address, size_t bytes) {
  if (const cudaError_t error = outside_capture("cudaMalloc")) return error;
  *address = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (!*address) return result(cudaErrorMemoryAllocation);
  emu_memory_register(reinterpret_cast<uint64_t>(*address), bytes, 0);
  runtime().allocations[*address] = bytes;
  return cudaSuccess;
}

cudaError_t cudaFree(void* address) {
  if (const cudaError_t error = outside_capture("cudaFree")) return error;
  if (!address) return cudaSuccess;
  if (!runtime().allocations.erase(address)) return result(cudaErrorInvalidValue);
  emu_memory_unregister(reinterpret_cast<uint64_t>(address));
  std::free(address);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  if (const cudaError_t error = outside_capture("cudaMemcpyAsync")) return error;
  std::memmove(to, from, bytes);
  emu_memory_initialise(reinterpret_cast<uint64_t>(to), bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (const cudaError_t error = outside_capture("cudaMemcpy")) return error;
  std::memmove(to, from, bytes);
  emu_memory_initialise(reinterpret_cast<uint64_t>(to), bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (const cudaError_t error = outside_capture("cudaMemsetAsync")) return error;
  std::memset(to, value, bytes);
  emu_memory_initialise(reinterpret_cast<uint64_t>(to), bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  if (const cudaError_t error = device_error()) return result(error);
  const bool captured = runtime().capturing && stream == runtime().captured_stream;
  *status = captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return outside_capture("cudaStreamSynchronize"); }
cudaError_t cudaDeviceSynchronize() { return outside_capture("cudaDeviceSynchronize"); }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  if (const cudaError_t error = device_error()) return result(error);
  *event = reinterpret_cast<cudaEvent_t>(new Event{0});
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  if (const cudaError_t error = device_error()) return result(error);
  reinterpret_cast<Event*>(event)->number = runtime().launches;
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t) { return device_error(); }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return outside_capture("cudaEventSynchronize"); }

// There is no time here; launches are counted in its place.
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds =
      float(reinterpret_cast<Event*>(end)->number - reinterpret_cast<Event*>(start)->number);
  return cudaSuccess;
}

// ---- for the tests ------------------------------------------------------------------------

// The six fields of Device; null: the default.
void emulated_device_set(const int32_t* fields) {
  runtime().device = Device{};
  if (fields) runtime().device = {fields[0], fields[1], fields[2], fields[3], fields[4], fields[5]};
  for (auto& entry : runtime().kernels) entry.second.max_dynamic_shared = SHARED_WITHOUT_ASKING;
}

void emulated_device_get(int32_t* fields) {
  const Device& d = runtime().device;
  const int32_t values[] = {d.capability,          d.multiprocessors, d.shared_of_block,
                            d.shared_of_processor, d.driver_version,  d.count};
  std::copy(std::begin(values), std::end(values), fields);
}

// `load` brings a kernel's program into the engine when it is first needed; 0: done.
void emulated_set_loader(int (*load)(const char* kernel)) { runtime().load = load; }

int64_t emulated_num_kernels() { return int64_t(runtime().kernels.size()); }

int64_t emulated_num_calls() { return int64_t(runtime().calls.size()); }
void emulated_clear_calls() { runtime().calls.clear(); }
const char* emulated_call_name(int64_t i) { return runtime().calls[i].name.c_str(); }

// grid, block, dynamic shared memory, number of parameters, is a launch, is captured; and the
// stream.
uint64_t emulated_call_shape(int64_t i, uint32_t* shape) {
  const Call& call = runtime().calls[i];
  const Shape& s = call.shape;
  const uint32_t values[] = {
      s.grid.x,       s.grid.y,     s.grid.z,           s.block.x,
      s.block.y,      s.block.z,    uint32_t(s.shared), uint32_t(call.params.size()),
      call.is_launch, call.captured};
  std::copy(std::begin(values), std::end(values), shape);
  return reinterpret_cast<uint64_t>(s.stream);
}

const char* emulated_call_param(int64_t i, int32_t param, int64_t* bytes) {
  const std::vector<char>& value = runtime().calls[i].params[param];
  *bytes = int64_t(value.size());
  return value.data();
}

// Runs launch `i` with the parameters that it was given, as a graph would. The last error is left
// alone.
int emulated_replay(int64_t i) {
  const Call call = runtime().calls[i];  // a copy: the list may grow
  std::vector<void*> params;
  for (const std::vector<char>& value : call.params)
    params.push_back(const_cast<char*>(value.data()));
  const cudaError_t error = run(call.name, call.shape, params.data());
  last_error = cudaSuccess;
  return error;
}

void emulated_capture(int on, uint64_t stream) {
  runtime().capturing = on != 0;
  runtime().captured_stream = reinterpret_cast<cudaStream_t>(stream);
}

const char* emulated_detail() { return runtime().detail.c_str(); }

}  // extern "C"
#pragma GCC visibility pop
