"""What several folders report as one: `test_caches.py` reads them, `test_data.py` and `test_corrupt.py` one of them."""

from kd_dist.rows import worst_reports


def report(kl: float, *gradients: float) -> dict:
    measured = dict(zip(("1", "4"), gradients, strict=False))
    return {"codec_error": {"logits": {"count": 10, "mean_kl_t1": kl, "gradient_error": measured}}}


def test_of_several_reports_the_worst_counts():
    parts = [report(1e-4, 0.01, 0.03), {"codec_error": {}, "teacher_report": None}, report(2e-4, 0.02, 0.01)]
    assert worst_reports(parts) == report(2e-4, 0.02, 0.03)
    assert worst_reports([report(1e-4, 0.01, 0.03), report(2e-4, 0.02)]) == report(2e-4, 0.02)
    said = [{"teacher_report": {"ccc": 0.5, "largest_error": error}} for error in (0.25, 0.75, 0.5)]
    assert worst_reports(said) == {"teacher_report": {"ccc": 0.5, "largest_error": 0.75}}
    assert worst_reports([{"teacher_report": {"rows": 3}}, {}]) == {}
