"""Models on the Hugging Face hub that cannot be had."""

import pytest

from orpheus.hub import fetch
from orpheus.settings import UserError


def test_an_unreachable_hub_names_a_way_out(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"hub cannot be reached; check the network, .* \(no route"):
        fetch("some/model", ["*"])


def test_a_gated_model_is_told_in_one_line(monkeypatch):
    import httpx
    import huggingface_hub

    def gated(*_, **__):
        answer = httpx.Response(403, request=httpx.Request("GET", "https://example.org"))
        raise huggingface_hub.errors.GatedRepoError("403", response=answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    with pytest.raises(UserError, match="some/model: gated: accept its terms"):
        fetch("some/model", ["*"])
