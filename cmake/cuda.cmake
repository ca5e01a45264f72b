# Defines aegaeon_cuda and AEGAEON_HAS_CUDA, where a CUDA compiler is found; without one,
# AEGAEON_CUDA=1 is an error and auto builds for the CPU alone.
# nvcc of CUDAToolkit's usual places, of CUDACXX, or of CUDA_HOME (as of the PyPI wheels).
include(CheckLanguage)
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(AEGAEON_NVCC nvcc
    HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(AEGAEON_NVCC)
    set(CMAKE_CUDA_COMPILER ${AEGAEON_NVCC})
  endif()
endif()
# Before the language is enabled, which would choose one for us. PTX of the last for what is newer.
set(CMAKE_CUDA_ARCHITECTURES 80-real 90 CACHE STRING "compute capabilities of the kernels")
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(AEGAEON_CUDA STREQUAL "1")
    message(FATAL_ERROR "AEGAEON_CUDA=1, but there is no nvcc; install the CUDA toolkit, name its "
      "directory by CUDA_HOME or nvcc itself by CUDACXX, or unset AEGAEON_CUDA")
  endif()
  message(STATUS "no nvcc: built for the CPU alone")
  return()
endif()

set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
# nvcc of the wheels looks for libraries where they have none.
get_filename_component(cuda_bin ${CMAKE_CUDA_COMPILER} DIRECTORY)
if(NOT EXISTS ${cuda_bin}/../lib64)
  string(APPEND CMAKE_CUDA_FLAGS " -L${cuda_bin}/../lib")
endif()
enable_language(CUDA)
# Not find_package(CUDAToolkit): it asks for a shared runtime, which we do without.
find_library(AEGAEON_CUDART cudart_static
  HINTS ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} ${cuda_bin}/../lib64 ${cuda_bin}/../lib REQUIRED)
find_package(Threads REQUIRED)

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cpp csrc/ops/cuda/*.cpp)
file(GLOB cuda_kernels CONFIGURE_DEPENDS csrc/ops/cuda/*.cu)
add_library(aegaeon_cuda STATIC ${cuda_sources} ${cuda_kernels})
# What the C++ compiler warns of is for our C++ sources; nvcc's own output would not pass.
target_include_directories(aegaeon_cuda PUBLIC csrc)
target_include_directories(aegaeon_cuda SYSTEM PUBLIC
  ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
set_source_files_properties(${cuda_sources} PROPERTIES COMPILE_OPTIONS
  "-Wall;-Wextra;-Wpedantic;-Wshadow;-Wconversion;-Wold-style-cast;-Werror")
# No spill and no local memory; no sum is fused that another kernel of the same rows has not.
target_compile_options(aegaeon_cuda PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-fmad=false;-Werror;\
all-warnings;SHELL:-Xptxas -warn-spills,-warn-lmem-usage,-Werror>")
target_compile_definitions(aegaeon_cuda PUBLIC AEGAEON_CUDA)
target_link_libraries(aegaeon_cuda PUBLIC
  ${AEGAEON_CUDART} Threads::Threads ${CMAKE_DL_LIBS} rt)
set(AEGAEON_HAS_CUDA ON)
