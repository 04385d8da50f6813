"""The native CPU engine: a whole network in one call, in C++ (csrc/cpu). All runs without it, too."""
