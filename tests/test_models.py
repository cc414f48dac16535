from pathlib import Path

import pytest
import torch

from lorafleet.models import pick_dtype

CPU = torch.device("cpu")
CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.parametrize(
    ("amx", "bfloat16", "name", "expected"),
    [
        (True, True, "Intel(R) Xeon(R) Platinum 8488C", torch.bfloat16),
        (False, True, "Intel(R) Xeon(R) Processor", torch.float32),
        (False, True, "AMD EPYC 9R45", torch.bfloat16),
        (False, False, "AMD EPYC 7R13", torch.float32),
        (False, True, None, torch.float32),
    ],
)
def test_auto_is_bfloat16_on_cpus_that_multiply_it_faster(monkeypatch, amx, bfloat16, name, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bfloat16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {} if name is None else {"cpu_name": name})
    assert pick_dtype("auto", CPU) == expected
    assert pick_dtype("float32", CPU) == torch.float32, "what is named is taken"
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.skipif(not CPUINFO.is_file(), reason="only Linux tells of its CPU in a file")
def test_auto_goes_by_this_cpu():
    told = CPUINFO.read_text()
    faster = "amx_tile" in told or ("avx512_bf16" in told and "AuthenticAMD" in told)
    assert pick_dtype("auto", CPU) == (torch.bfloat16 if faster else torch.float32)
