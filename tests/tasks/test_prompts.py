from dataclasses import replace

from lorafleet.tasks import Task, prompt_version


def test_the_prompt_version_is_another_one_when_keys_are_rendered_in_another_way(monkeypatch):
    now, render = prompt_version(), Task.render
    prompt_version.cache_clear()
    assert prompt_version() == now

    def joined_by_a_space(task, row):
        example = render(task, row)
        return replace(example, key=example.key.replace("\n", " "))

    monkeypatch.setattr(Task, "render", joined_by_a_space)
    prompt_version.cache_clear()
    assert prompt_version() != now
    monkeypatch.undo()
    prompt_version.cache_clear()
