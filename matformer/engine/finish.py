"""What a finished run leaves: its full evaluation, its gallery of samples."""

from __future__ import annotations

import logging
from pathlib import Path

from matformer.engine.evaluate import evaluate_run
from matformer.engine.gallery import make_gallery

log = logging.getLogger(__name__)


def finish(run_folder: Path) -> None:
    """Evaluate the average of the last checkpoint beside the baselines, then make samples with it. One process."""
    log.info("evaluating on held-out data, with baselines")
    evaluate_run(run_folder, ema=True)
    log.info("making samples")
    make_gallery(run_folder)
