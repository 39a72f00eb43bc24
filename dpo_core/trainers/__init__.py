"""The trainers: for each method of `methods` a module of the same name, with its trainer and `build`.

`build(job, settings)` returns the trainer of a job, and the function that writes the trained model.
"""
