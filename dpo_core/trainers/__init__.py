"""The trainers: for each method of `methods` a module of the same name, with its trainer and `build`."""
