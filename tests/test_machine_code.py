"""Reading machine code: the inner loop and its shortest step, out of listings small enough to count by hand."""

from __future__ import annotations

from expertmesh.kernels.machine_code import _parse, _shortest_step, read_amd


def listing(*lines: str) -> str:
    """As nvdisasm writes: labels, and instructions with an address."""
    texts = []
    for i, line in enumerate(lines):
        texts.append(line if line.endswith(":") else f"        /*{i * 16:04x}*/                   {line} ;")
    return "\n".join(texts)


def step_of(*lines: str) -> int | None:
    return _shortest_step(*_parse(listing(*lines)))


def test_a_loop_is_counted_without_what_is_around_it():
    assert (
        step_of("MOV R1, R2", ".L_x_0:", "LDS R4", "HGMMA.64x128x16.F32", "@P0 BRA `(.L_x_0)", "STG.E.128", "EXIT") == 3
    )


def test_no_tensor_cores_no_step():
    assert step_of(".L_x_0:", "FADD R1, R2, R3", "@P0 BRA `(.L_x_0)", "EXIT") is None


def test_the_innermost_loop_is_meant():
    outer_and_inner = (
        *(".L_x_0:", "MOV R1, R2", ".L_x_1:", "HMMA.16816.F32", "@P0 BRA `(.L_x_1)"),
        *("STG.E.128 [R1]", "@P1 BRA `(.L_x_0)", "EXIT"),
    )
    assert step_of(*outer_and_inner) == 2


def test_a_branch_around_is_taken_and_one_around_the_work_is_not():
    epilogue = (
        ".L_x_0:",
        "HGMMA.64x128x16",
        "@P0 BRA `(.L_x_2)",
        "STG.E [R1]",
        "STG.E [R2]",
        ".L_x_2:",
        "@P1 BRA `(.L_x_0)",
    )
    assert step_of(*epilogue, "EXIT") == 3
    skipped = (".L_x_0:", "@P0 BRA `(.L_x_2)", "MOV R1, R2", "HGMMA.64x128x16", ".L_x_2:", "@P1 BRA `(.L_x_0)")
    assert step_of(*skipped, "EXIT") == 4


def test_instructions_that_never_run_are_not_counted():
    assert step_of(".L_x_0:", "NOP", "@!PT LDS RZ, [RZ]", "HGMMA.64x128x16", "@P0 BRA `(.L_x_0)", "EXIT") == 2


def test_amd():
    assembly = """
        global_load_dwordx4 v[0:3], v4, s[0:1]
        .LBB0_1:
        ds_read_b128 v[4:7], v8
        v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
        s_cbranch_scc1 .LBB0_1
        global_store_dwordx2 v4, v[0:1], s[0:1]
        s_endpgm
        .vgpr_count:     90
        .vgpr_spill_count: 2
    """
    code = read_amd(assembly)
    assert (code.registers, code.spill_bytes, code.tensor_core_instructions) == (90, 8, 1)
    assert (code.step_instructions, code.load_bytes, code.store_bytes) == (3, 16, 8)
