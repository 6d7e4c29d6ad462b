"""Every scheme by every method on small models, by whichever engine is first on the path: for same_bytes.py.

    python every_recipe.py INPUTS OUTPUTS [RECIPE]

INPUTS has a folder for each model and texts.jsonl. RECIPE: the name of the only one that is
wanted. Prints, as JSON, what was written: case, file, SHA-256.
Only the public face of the engine is used, which is the same in every version.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compression import SCHEMES, Calibration, CompressionError, DatasetSpec, Evaluation, Recipe, compress

_SMALL = Calibration(num_calibration_samples=8, max_seq_length=64)
_FEW = Evaluation(num_samples=4)
_COMPARED = ("*.safetensors", "config.json")

Steps = list[dict[str, Any]]


def recipes() -> Iterator[tuple[str, Steps]]:
    """Names and steps of all that is compared. Each scheme that can be has a group_size of 32."""
    for scheme, preset in SCHEMES.items():
        by_group = preset.weights.strategy == "group" and preset.weights.scale_dtype is None
        size = {"group_size": 32} if by_group else {}
        for method in ("rtn", "gptq"):
            yield f"{method} {scheme}", [{"type": method, "scheme": scheme, **size}]
    grouped = {"scheme": "W4A16", "group_size": 32}
    for observer in ("minmax", "mse", "imatrix", "gram"):
        yield f"rtn W4A16 {observer}", [{"type": "rtn", **grouped, "observer": observer}]
    yield "awq W4A16", [{"type": "awq", "n_grid": 4}, {"type": "rtn", **grouped}]
    yield "awq gptq W4A16", [{"type": "awq", "n_grid": 4}, {"type": "gptq", **grouped}]
    yield "smoothquant W8A8", [{"type": "smoothquant"}, {"type": "gptq", "scheme": "W8A8"}]
    for method in ("sparsegpt", "wanda", "magnitude"):
        yield f"{method} 2:4", [{"type": method, "mask_structure": "2:4"}]
        yield f"{method} 50%", [{"type": method, "sparsity": 0.5}]
    yield "sparsegpt gptq", [{"type": "sparsegpt", "mask_structure": "2:4"}, {"type": "gptq", **grouped}]
    yield "kv cache", [{"type": "rtn", "scheme": "FP8_DYNAMIC", "kv_cache_scheme": {}}]


def main() -> None:
    inputs, outputs = Path(sys.argv[1]), Path(sys.argv[2])
    written: dict[str, dict[str, str]] = {}
    for model in sorted(path for path in inputs.iterdir() if (path / "config.json").exists()):
        for name, steps in recipes():
            if sys.argv[3:] and name != sys.argv[3]:
                continue
            output = outputs / f"{len(written)}"
            try:
                compress(
                    model,
                    Recipe.model_validate({"steps": steps}),
                    output,
                    dataset=DatasetSpec(path=str(inputs / "texts.jsonl")),
                    calibration=_SMALL,
                    evaluation=_FEW,
                    device="cpu",
                )
            except CompressionError as error:
                written[f"{model.name}, {name}"] = {"refused": error.code}
                continue
            files = sorted(path for pattern in _COMPARED for path in output.glob(pattern))
            written[f"{model.name}, {name}"] = {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files
            }
    sys.stdout.write("\n" + json.dumps(written) + "\n")


if __name__ == "__main__":
    main()
