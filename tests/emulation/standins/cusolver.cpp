// SPDX-License-Identifier: Apache-2.0
// cuSOLVER: handles, parameters, versions.
#include "cusolver.h"

namespace osora::standins {
namespace {

constexpr int kFirstWithBatchedEigen = 11701;  // CUDA 12.6.2

void need_live(cusolverDnHandle_t handle) {
  need_or(CUSOLVER_STATUS_NOT_INITIALIZED, is_object(handle, kSolver), handle, " is no live ", kSolver);
}

template <class Object>
cusolverStatus_t make(const char* name, const char* kind, Object** place) {
  return run_solver(name, [&](const Call&) {
    need(place, "the place for the ", kind, " is null");
    need(!settings().capturing, kind, " made while a graph is being captured");
    *place = new Object;
    add_object(*place, kind);
  });
}

template <class Object>
cusolverStatus_t destroy(const char* name, const char* kind, Object* object) {
  return run_solver(name, [&](const Call&) {
    remove_object(object, kind);
    delete object;
  });
}

}  // namespace

void need_solver(cusolverDnHandle_t handle) {
  need_live(handle);
  need(handle->stream == stream(), "the handle's stream is not the current one");
}

void need_params(cusolverDnParams_t params) { need(is_object(params, kParams), params, " are no live ", kParams); }

void need_types(std::initializer_list<cudaDataType> types) {
  for (const cudaDataType type : types) {
    need(type == CUDA_R_32F || type == CUDA_R_64F, name_of(type), " is not modelled");
    need(type == *types.begin(), "the types differ: ", name_of(*types.begin()), " and ", name_of(type));
  }
}

void write_info(const Call& call, int* info, int64_t index, int computed, std::initializer_list<Matrix> results) {
  info[index] = call.info(index, computed);
  if (info[index] == 0) return;
  for (const Matrix& result : results)
    if (result.rows && result.columns) fill_nan(result, index);
}

}  // namespace osora::standins

using namespace osora::standins;

extern "C" {

cusolverStatus_t cusolverDnCreate(cusolverDnHandle_t* handle) { return make("cusolverDnCreate", kSolver, handle); }
cusolverStatus_t cusolverDnDestroy(cusolverDnHandle_t handle) { return destroy("cusolverDnDestroy", kSolver, handle); }
cusolverStatus_t cusolverDnCreateParams(cusolverDnParams_t* params) {
  return make("cusolverDnCreateParams", kParams, params);
}
cusolverStatus_t cusolverDnDestroyParams(cusolverDnParams_t params) {
  return destroy("cusolverDnDestroyParams", kParams, params);
}
cusolverStatus_t cusolverDnCreateGesvdjInfo(gesvdjInfo_t* info) {
  return make("cusolverDnCreateGesvdjInfo", kJacobi, info);
}
cusolverStatus_t cusolverDnDestroyGesvdjInfo(gesvdjInfo_t info) {
  return destroy("cusolverDnDestroyGesvdjInfo", kJacobi, info);
}

cusolverStatus_t cusolverDnSetStream(cusolverDnHandle_t handle, cudaStream_t given) {
  return run_solver("cusolverDnSetStream", [&](const Call&) {
    need_live(handle);
    handle->stream = given;
  });
}

cusolverStatus_t cusolverDnSetDeterministicMode(cusolverDnHandle_t handle, cusolverDeterministicMode_t mode) {
  return run_solver("cusolverDnSetDeterministicMode", [&](const Call&) {
    need_live(handle);
    need(mode == CUSOLVER_DETERMINISTIC_RESULTS || mode == CUSOLVER_ALLOW_NON_DETERMINISTIC_RESULTS, "no such mode");
    handle->mode = mode;
  });
}

cusolverStatus_t cusolverDnSetAdvOptions(cusolverDnParams_t params, cusolverDnFunction_t function,
                                         cusolverAlgMode_t algorithm) {
  return run_solver("cusolverDnSetAdvOptions", [&](const Call&) {
    need_params(params);
    need(function == CUSOLVERDN_SYEVBATCHED, "function ", static_cast<int>(function), " is not modelled");
    need(settings().cusolver_version >= kFirstWithBatchedEigen, "this cuSOLVER has no XsyevBatched");
    need(algorithm == CUSOLVER_ALG_0 || algorithm == CUSOLVER_ALG_1, "XsyevBatched has no such algorithm");
    params->batched_eigen = algorithm;
  });
}

cusolverStatus_t cusolverGetProperty(libraryPropertyType type, int* value) {
  return run_solver("cusolverGetProperty", [&](const Call&) {
    need(value, "the place for the value is null");
    const int version = settings().cusolver_version;
    need(type == MAJOR_VERSION || type == MINOR_VERSION || type == PATCH_LEVEL, "no such property");
    *value = type == MAJOR_VERSION ? version / 1000 : type == MINOR_VERSION ? version / 100 % 10 : version % 100;
  });
}

cusolverStatus_t cusolverDnXgesvdjSetTolerance(gesvdjInfo_t info, double tolerance) {
  return run_solver("cusolverDnXgesvdjSetTolerance", [&](const Call&) {
    need(is_object(info, kJacobi), info, " are no live ", kJacobi);
    need(tolerance >= 0, "the tolerance is ", tolerance);
    info->tolerance = tolerance;
  });
}

cusolverStatus_t cusolverDnXgesvdjSetMaxSweeps(gesvdjInfo_t info, int sweeps) {
  return run_solver("cusolverDnXgesvdjSetMaxSweeps", [&](const Call&) {
    need(is_object(info, kJacobi), info, " are no live ", kJacobi);
    need(sweeps > 0, "at most ", sweeps, " sweeps");
    info->max_sweeps = sweeps;
  });
}

}  // extern "C"
