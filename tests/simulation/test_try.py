import wardround
def test_a(without_ray, options, mediflow_folder, tmp_path, capsys):
    o=[x for x in options if x!="alignment=none"]+[f"alignment.path={mediflow_folder}","alignment=mediflow","alignment.examples=8","alignment.held_out=4","alignment.max_tokens=96","alignment.sft.steps=1","alignment.dpo.steps=1","alignment.dpo.batch=2","evaluation.alone=false",f"runs={tmp_path}/r","privacy=none"]
    for more in (["alignment.targets=[c_attn]"],["alignment.rank=100"],["adapter.rank=200"],["adapter.targets=[c_attn]"],["alignment.path=/nope"],["model.path=/nope"],["notes.text_field=nope"],["alignment.max_tokens=32"],["hospitals.count=9"],["privacy.max_tokens=8192"],["adapter.targets=[q_proj,c_attn]"],["evaluation.max_tokens=8192"],["notes.path=/work"],["seed=3","notes.encoding=klingon"]):
        try: rc=wardround.main(["simulate",*o,*more])
        except BaseException as e: rc=repr(e)[:300]
        err=capsys.readouterr().err.splitlines()
        print(more,rc,"|",err[-1][:300] if err else "")
    assert 0
