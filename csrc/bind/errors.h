// C++ failures as the classes of aegaeon.errors.
#pragma once

namespace aegaeon {

// Looks the classes up and registers the translation, once per interpreter.
void bind_errors();

}  // namespace aegaeon
