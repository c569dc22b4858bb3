// A rank's end of a group of GPUs as a class of torch, for any device that CheckedOps is for.
#pragma once

#include <ATen/ops/empty.h>
#include <torch/custom_class.h>

#include <numeric>
#include <optional>

#include "nccl/allreduce.h"
#include "torch/checked_ops.h"

namespace gqsgd {

inline Tensor nccl_unique_id() {
  ncclUniqueId id;
  check_nccl(ncclGetUniqueId(&id), "ncclGetUniqueId");
  const Tensor bytes = at::empty({static_cast<int64_t>(sizeof(id))}, at::kByte);
  memcpy(bytes.mutable_data_ptr(), &id, sizeof(id));
  return bytes;
}

// All operations are enqueued on the current stream of the device; the host waits for nothing.
template <class Device>
class NcclCommunicator : public torch::CustomClassHolder {
 public:
  // `id` is what nccl_unique_id() gave one of the ranks. Waits until all of them are here.
  NcclCommunicator(const Tensor& id, int64_t rank, int64_t size, at::Device device)
      : device_(device) {
    ncclUniqueId unique;
    check_buffer(id, "id", at::kByte, sizeof(unique), at::kCPU);
    TORCH_CHECK_VALUE(0 <= rank && rank < size && size <= INT32_MAX, "rank must be from 0 to ",
                      size - 1, ", got ", rank);
    memcpy(&unique, id.const_data_ptr(), sizeof(unique));
    Device::run(device_, [&](const CudaKernels&) {
      group_.emplace(unique, static_cast<int>(rank), static_cast<int>(size));
    });
  }

  // By all ranks; nothing can be called after it.
  void close() {
    Device::run(device_, [&](const CudaKernels&) { group().close(); });
    group_.reset();
  }

  void max(Tensor tensor) { all_reduce(tensor, ncclMax); }
  void sum(Tensor tensor) { all_reduce(tensor, ncclSum); }

  // `splits[rank]` elements of `from` to each rank; to `to`, `received[rank]` elements of each.
  void all_to_all(const Tensor& from, Tensor to, std::vector<int64_t> splits,
                  std::vector<int64_t> received) {
    check_lengths(splits);
    check_lengths(received);
    check_buffer(from, "from", to.scalar_type(), total(splits), device_);
    check_buffer(to, "to", to.scalar_type(), total(received), device_);
    for (int64_t& split : splits) split *= to.element_size();
    for (int64_t& length : received) length *= to.element_size();
    Device::run(device_, [&](const CudaKernels& kernels) {
      group().all_to_all(from.const_data_ptr(), to.mutable_data_ptr(), splits, received,
                         kernels.stream);
    });
  }

  // The `lengths[rank]` elements of all ranks, end to end.
  void all_gather(const Tensor& from, Tensor to, std::vector<int64_t> lengths) {
    check_lengths(lengths);
    check_buffer(from, "from", to.scalar_type(), lengths[group().rank], device_);
    check_buffer(to, "to", to.scalar_type(), total(lengths), device_);
    for (int64_t& length : lengths) length *= to.element_size();
    Device::run(device_, [&](const CudaKernels& kernels) {
      group().all_gather(from.const_data_ptr(), to.mutable_data_ptr(), lengths, kernels.stream);
    });
  }

  // `scale` times the sum over the ranks, to `out`, which may be `x`.
  void allreduce(const Tensor& x, Tensor out, Tensor norms, std::optional<Tensor> squares,
                 Tensor words, int64_t block_size, int64_t kind, int64_t bits, int64_t levels,
                 int64_t seed, int64_t step, int64_t tensor_id, bool correlated, double scale) {
    const Layout layout = layout_of(x.numel(), block_size, bits);
    CodeArgs args = code_args(x, norms, words, layout, kind, bits, levels);
    check_added(args);
    args.norms = nullptr;
    check_buffer(x, "x", x.scalar_type(), x.numel(), device_);
    check_buffer(out, "out", x.scalar_type(), x.numel(), device_);
    if (squares) check_buffer(*squares, "squares", at::kLong, layout.blocks(), device_);
    TORCH_CHECK_VALUE(group().size <= most_ranks(args), "at most ", most_ranks(args),
                      " ranks can be summed at ", bits, " bits and ", levels, " levels, got ",
                      group().size);
    const NcclReduction reduction{
        args,
        x.const_data_ptr(),
        out.mutable_data_ptr(),
        norms.mutable_data_ptr(),
        squares ? squares->mutable_data_ptr<int64_t>() : nullptr,
        words.mutable_data_ptr(),
        static_cast<uint64_t>(seed),
        static_cast<uint64_t>(step),
        static_cast<uint64_t>(tensor_id),
        correlated,
        scale,
    };
    Device::run(device_,
                [&](const CudaKernels& kernels) { linear_allreduce(reduction, kernels, group()); });
  }

  static void register_all(torch::Library& m) {
    m.class_<NcclCommunicator>("NcclCommunicator")
        .def(torch::init<const Tensor&, int64_t, int64_t, at::Device>())
        .def("close", &NcclCommunicator::close)
        .def("max", &NcclCommunicator::max)
        .def("sum", &NcclCommunicator::sum)
        .def("all_to_all", &NcclCommunicator::all_to_all)
        .def("all_gather", &NcclCommunicator::all_gather)
        .def("allreduce", &NcclCommunicator::allreduce);
    m.def("nccl_unique_id() -> Tensor", &nccl_unique_id);
  }

 private:
  NcclGroup& group() {
    TORCH_CHECK(group_, "the communicator was closed");
    return *group_;
  }
  void all_reduce(Tensor tensor, ncclRedOp_t op) {
    const at::ScalarType type = tensor.scalar_type();
    TORCH_CHECK_TYPE(type == at::kInt || type == at::kLong, "the tensor must be Int or Long, got ",
                     type);
    check_buffer(tensor, "the tensor", type, tensor.numel(), device_);
    Device::run(device_, [&](const CudaKernels& kernels) {
      group().all_reduce(tensor.mutable_data_ptr(), tensor.numel(),
                         type == at::kInt ? ncclInt32 : ncclInt64, op, kernels.stream);
    });
  }
  void check_lengths(const std::vector<int64_t>& lengths) {
    TORCH_CHECK_VALUE(static_cast<int64_t>(lengths.size()) == group().size, "there must be ",
                      group().size, " lengths, one a rank, got ", lengths.size());
    for (const int64_t length : lengths) {
      TORCH_CHECK_VALUE(length >= 0, "lengths must be at least 0, got ", length);
    }
  }
  static int64_t total(const std::vector<int64_t>& lengths) {
    return std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
  }

  at::Device device_;
  std::optional<NcclGroup> group_;
};

}  // namespace gqsgd
