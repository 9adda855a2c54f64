"""Networks in and out of ONNX files.

`onnx_file` reads and vets a file; `onnx_import` walks its nodes and lets `operators` (with one
module of converters for each family) build an fx graph through `builder`; `fusions` puts together
what exporters take apart. `onnx_export` writes and checks. Submodules import `onnx` when they need
it, so that this package can be imported without it.
"""
