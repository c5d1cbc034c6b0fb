"""The benchmark of the kernels' checks times copies of the kernels that lack them."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from fusewire.custom_ops.providers.symm_mem import launcher


@pytest.mark.parametrize("name", ["one_shot_kernel", "two_shot_data_kernel", "two_shot_flags_kernel"])
def test_copies_are_kernels_without_the_checks(tmp_path, monkeypatch, name):
    import check_cost

    monkeypatch.setattr(sys, "path", list(sys.path))
    for module in [module for module in sys.modules if module.startswith(check_cost.COPY)]:
        monkeypatch.delitem(sys.modules, module)
    check_cost.copy_without_checks(tmp_path)
    copy, kernel = check_cost.kernel_without_checks(name), launcher.kernel(name)
    assert copy.src == kernel.src
    assert copy.cache_key != kernel.cache_key  # of what it calls
    for file, (line, other) in check_cost.TAKEN_OUT.items():
        text = (tmp_path / check_cost.COPY / file).read_text()
        assert line not in text
        assert other in text
