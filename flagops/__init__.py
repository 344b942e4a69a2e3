from pathlib import Path

if not (Path(__file__).parent / "kernels").is_dir():  # a checkout: kernels/ and reference/ lie beside this folder
    __path__.append(str(Path(__file__).parents[1]))
