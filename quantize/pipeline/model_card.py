"""The model card of a quantized checkpoint, its README.md on the hub."""

from __future__ import annotations

import shlex
from pathlib import Path

from dbrx_q.config import DbrxConfig

from .records import RunRecord
from .report import bits_by_kind, calibration_sentence, error_table, source_table
from .report_held_out import hurt_line, source_lines

__all__ = ["model_card"]

_HUB_LICENSES = {
    "databricks/dbrx-instruct": "databricks-open-model-license",
    "databricks/dbrx-base": "databricks-open-model-license",
}


def model_card(name: str, source: str, config: DbrxConfig, run: RunRecord, files: list[str]) -> str:
    """Markdown with the hub's front matter. It names no times and no machine: the same input, options and seed give the same text.

    Args:
        name: of the checkpoint: a folder or a hub id.
        source: the hub id or folder of the original, as it was given.
        config: of the model.
        run: the record of the run.
        files: names of the files in the checkpoint, among which the licence is looked up.
    """
    bits = 8 * run.bytes_out / run.parameters
    on_hub = not Path(source).exists() and source.count("/") == 1
    front = ["---", "library_name: dbrx_q", "pipeline_tag: text-generation"]
    if on_hub:
        front += [f"base_model: {source}", "base_model_relation: quantized"]
    if source in _HUB_LICENSES:
        front += ["license: other", f"license_name: {_HUB_LICENSES[source]}"]
    licence = next((file for file in sorted(files) if file.startswith("LICENSE")), None)
    if licence and source in _HUB_LICENSES:
        front.append(f"license_link: {licence}")
    front += ["tags:", "- dbrx", "- mixture-of-experts", "- quantized", "---"]
    ffn = config.ffn_config
    about = f"{config.n_layers} layers, {ffn.moe_num_experts} experts of which {ffn.moe_top_k} are active for a token"
    base = source if on_hub else Path(source).resolve().name
    lines = [
        *front,
        "",
        f"# {name}",
        "",
        f"{base} ({about}) quantized by dbrx_q to {bits:.3f} bits per weight: {run.bytes_out:,} bytes instead of ",
    ]
    lines[-1] += f"{run.bytes_in:,}."
    lines += [
        "",
        "```sh",
        "pip install dbrx_q",
        f"dbrx-q verify {shlex.quote(name)}",
        f'dbrx-q generate {shlex.quote(name)} --prompt "..."',
        "```",
        "",
    ]
    lines += ["```python", "from dbrx_q import DbrxForCausalLM", f'model = DbrxForCausalLM.from_pretrained("{name}")', "```"]
    lines += ["", "In transformers (`pip install 'dbrx_q[transformers]'`):", ""]
    lines += ["```python", "import dbrx_q.transformers", "from transformers import AutoModelForCausalLM", ""]
    lines += [f'model = AutoModelForCausalLM.from_pretrained("{name}")', "```"]
    lines += ["", "## Formats", "", "| tensors | formats | bits per weight |", "|---|---|---|"]
    for kind, bits_per_weight in bits_by_kind(run).items():
        formats = sorted({record.format for record in run.records if record.kind == kind})
        lines.append(f"| {kind} | {', '.join(formats)} | {bits_per_weight:.3f} |")
    lines += ["", "## How it was made", "", f"Quantization method `{run.method}`."]
    if run.options.get("kept"):
        lines[-1] += (
            f" Matrices of the source that were quantized already ({', '.join(run.options['kept'])}) are repacked, not rounded again."
        )
    calibration = run.options.get("calibration")
    if calibration:
        lines += [f"Calibration: {calibration_sentence(calibration)}.", *source_table(calibration)]
    undersampled = {(record.layer, record.expert) for record in run.undersampled}
    if undersampled:
        data = "all tokens of their layer, or without data where the layer has too few"
        lines += ["", f"{len(undersampled)} expert(s) were reached by too few tokens, and calibrated with {data}."]
    lines += ["", "| matrix | format | relative error, mean | largest |", "|---|---|---|---|"]
    lines += [f"| {matrix} | {fmt} | {mean:.4f} | {largest:.4f} |" for matrix, fmt, mean, largest, _ in error_table(run)]
    if run.held_out:
        lines += ["", "## Measured on tokens to which nothing is fitted", ""]
        lines += [f"{line}." for line in (hurt_line(run),) if line is not None] + ["", *source_lines(run)]
    lines += ["", "`quantization_report.md` has the details; `dbrx-q compare` measures the loss on a text."]
    return "\n".join(lines) + "\n"
