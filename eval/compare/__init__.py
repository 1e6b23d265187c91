"""Measures checkpoints against a reference, on the same tokens: `dbrx-q compare` and `dbrx-q reference`.

Begin with `run.py`: it checks that the checkpoints belong to the reference's model, loads as many as fit into memory, and resumes an
interrupted run. `measure.py` holds the measurement itself: predictions, routers and hidden states of one checkpoint against those of the
reference, batch by batch. `summary.py` computes the figures from these scores.

- `reference.py` defines what a reference provides, and implements it for a model that runs along with the checkpoints.
- `reference_file.py` reads the predictions of a saved reference; its docstring describes the file format.
- `reference_writer.py` writes that file.
- `result.py` has the results, as in the JSON output.
- `report.py` writes the report's folder and draws its plots.
- `report_markdown.py` and `report_html.py` write the two documents of a report, the page from `report_template.html`.
- `report_text.py` formats names and figures for both.
"""
