"""Sums that tell whether replicas are equal."""

import pytest
import torch
from snapshotd_client import sums
from snapshotd_client.replicas import ReplicaDigest
from snapshotd_client.sums import content_sums

DTYPES = [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_bit_of_each_element_counts(dtype, monkeypatch):
    """Breaks: replicas that drifted apart are taken for equal, and parts of both are put together at a restore."""
    monkeypatch.setattr(sums, "_STRETCH", 8)
    tensor = torch.randint(0, 2, (5, 7)).to(dtype)
    before = content_sums([tensor]).tolist()
    parts = torch.view_as_real(tensor) if dtype.is_complex else tensor
    bytes_of = parts.reshape(-1).view(torch.uint8)
    for place in range(0, bytes_of.numel(), 3):
        for bit in (0, 7):
            bytes_of[place] ^= 1 << bit
            assert before != content_sums([tensor]).tolist()
            bytes_of[place] ^= 1 << bit
    assert before == content_sums([tensor]).tolist()


def test_an_exchange_of_two_elements_counts_and_how_they_lie_does_not(monkeypatch):
    """Breaks: two values that changed places go unnoticed, or the same values in other strides are called others."""
    monkeypatch.setattr(sums, "_STRETCH", 8)
    tensor = torch.arange(40.0).reshape(5, 8)
    same = tensor.t().contiguous().t()
    assert content_sums([tensor]).tolist() == content_sums([same]).tolist()
    swapped = tensor.clone()
    swapped[0, 1], swapped[0, 2] = tensor[0, 2], tensor[0, 1]
    assert content_sums([tensor]).tolist() != content_sums([swapped]).tolist()


def test_not_even_zeros_of_another_sign_or_nothing_at_all_are_an_error():
    """Breaks: a model with an empty tensor cannot be captured; -0.0 and 0.0 are one value and two bit patterns."""
    assert content_sums([torch.empty(0, 3)]).tolist() == []
    assert content_sums([torch.tensor(0.0)]).tolist() != content_sums([torch.tensor(-0.0)]).tolist()


def test_the_digest_of_replicas_has_all_devices():
    """Breaks: what lies on a device is left out of the comparison."""

    class Stream:
        def sums(self, sources):
            return torch.tensor([len(sources)])

    def digest(tensors):
        return ReplicaDigest(tensors, {"meta": Stream()}).hexdigest()

    host, there = torch.ones(3), torch.ones(3, device="meta")
    found = {digest(some) for some in ([host], [host, there], [host, there, there], [there], [host + 1, there])}
    assert len(found) == 5
