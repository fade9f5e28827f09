"""Why an extension is not there: what the build wrote beside the package."""

from pathlib import Path


def missing_extension_reason(name: str) -> str:
    """The sentence for `name` (`_cpu` or `_cuda`), as `wrn-fast info` and `unsupported` print it."""
    file = Path(__file__).with_name("_build_reasons.txt")
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            extension, _, reason = line.partition(": ")
            if extension == name:
                return f"extension {name} is not built: {reason}"
    tree = file.parents[1]
    if (tree / "setup.py").is_file():
        return f"extension {name} is not built in {tree}, whose wrn_fast this is (pip install -e . there)"
    return f"extension {name} is not built: no build was run for this Python (pip install . in the source tree)"
