// Failures of shared memory and of copies as the classes of aegaeon.errors.
#pragma once

#include <exception>

namespace aegaeon {

// Looks the classes up, once. False, with Python's error set, when that fails.
bool find_error_classes();

// Sets Python's error when `failure` is one of ours, else throws it on.
void translate_error(std::exception_ptr failure);

}  // namespace aegaeon
