from __future__ import annotations

import numpy as np
from PIL import Image

from autoglm_lab.engine.protocol import Answer, Timings, Usage
from autoglm_lab.policy import MemoryPolicy
from autoglm_lab.samples import SAMPLES
from autoglm_lab.widgets.attachments import LIMIT
from autoglm_lab.widgets.dashboard import Dashboard
from autoglm_lab.widgets.transcript import MOST_CONVERSATIONS, figures, transcript_of
from tests.unit.widgets.browser import browser_sends, open_view, until
from tests.unit.widgets.test_attachments import png, wav


def say(dashboard, text, **more):
    browser_sends(dashboard.chat, "send", text=text, **({"files": []} | more))


def answers(dashboard):
    return [message for message in dashboard.chat.messages if message["role"] == "assistant"]


def test_an_answer_is_the_engines_own_with_its_figures(wb, dashboard):
    say(dashboard, "你是谁?")
    until(lambda: answers(dashboard), "the answer")
    expected = wb.chat("你是谁?", conversation="same question").result(60)
    [answer] = answers(dashboard)
    assert answer["text"] == expected.text
    assert answer["figures"]["new_tokens"] == expected.usage.completion_tokens
    assert answer["figures"]["finish"] == expected.finish_reason
    assert dashboard.chat.messages[0]["text"] == "你是谁?"
    assert dashboard.chat.running == {}


def test_an_answer_tells_what_each_phase_took_beside_its_peak():
    answer = Answer(
        "text",
        "",
        "stop",
        Usage(),
        Timings(),
        peak_bytes={"load": 900, "prefill": 1200, "decode": 1100},
        work_bytes={"load": 0, "prefill": 300, "decode": 50},
    )
    assert figures(answer)["peak"] == 1200
    assert figures(answer)["phases"] == [
        {"phase": "prefill", "work": 300, "peak": 1200},
        {"phase": "decode", "work": 50, "peak": 1100},
    ]


def test_the_text_streams_while_it_is_made(wb, dashboard):
    seen = []
    dashboard.chat.observe(lambda change: seen.append(dict(change["new"])), "running")
    say(dashboard, "你是谁?")
    until(lambda: answers(dashboard), "the answer")
    texts = [state["text"] for state in seen if state]
    assert any(texts)
    assert all(answers(dashboard)[0]["text"].startswith(text) for text in texts)


def test_an_image_reaches_the_model_as_it_was_sent(wb, dashboard):
    say(dashboard, "How many icons are there?", files=[{"kind": "image", "name": "a.png"}], buffers=[png()])
    until(lambda: answers(dashboard), "the answer")
    assert answers(dashboard)[0]["figures"]["image_tokens"] > 0
    assert dashboard.chat.messages[0]["attachments"][0]["width"] == 400


def test_what_an_image_takes_shows_before_it_is_sent(wb, dashboard):
    browser_sends(dashboard.chat, "measure", width=1080, height=2400)
    until(lambda: dashboard.chat.state["image_tokens"], "the tokens")
    expected = wb.image_tokens((1080, 2400))
    assert dashboard.chat.state["image_tokens"] == {"1080x2400": expected}
    assert expected == wb.model.config.image_seq_length
    assert wb.image_tokens(Image.new("RGB", (30, 40))) == expected
    for width in range(20, 40):
        browser_sends(dashboard.chat, "measure", width=width, height=10)
    until(lambda: "39x10" in dashboard.chat.state["image_tokens"], "the last")
    assert len(dashboard.chat.state["image_tokens"]) == 8
    browser_sends(dashboard.chat, "measure", width=10**6, height=10**6)
    browser_sends(dashboard.chat, "measure", width=0, height=5)
    assert not {"1000000x1000000", "0x5"} & set(dashboard.chat.state["image_tokens"])


def test_a_sample_is_one_click_away_with_its_question_in_both_languages(wb, dashboard):
    offered = dashboard.chat.state["samples"]
    assert [card["name"] for card in offered] == [sample.name for sample in SAMPLES]
    assert all(set(card["prompt"]) == set(card["title"]) == {"en", "zh"} for card in offered)
    both = next(sample for sample in SAMPLES if sample.image and sample.audio)
    say(dashboard, both.prompt["en"], sample=both.name)
    until(lambda: answers(dashboard), "the answer")
    shown = dashboard.chat.messages[0]["attachments"]
    assert [card["kind"] for card in shown] == ["image", "audio"]
    assert shown[1]["seconds"] > 0
    assert answers(dashboard)[0]["figures"]["image_tokens"] * answers(dashboard)[0]["figures"]["audio_tokens"] > 0


def test_a_refused_request_is_told_in_the_conversation(wb, dashboard):
    wb.policy = MemoryPolicy(modules={"audio": "off"})
    say(dashboard, "", files=[{"kind": "audio", "name": "a.wav"}], buffers=[wav(0.5)])
    until(lambda: answers(dashboard), "the error")
    assert "needs the module 'audio'" in answers(dashboard)[0]["error"]
    say(dashboard, "Who are you?")
    until(lambda: len(answers(dashboard)) == 2, "the next answer")
    assert answers(dashboard)[1]["text"]


def test_a_file_that_is_no_image_is_told_in_the_conversation(dashboard):
    say(dashboard, "Look", files=[{"kind": "image", "name": "<b>x</b>.png"}], buffers=[b"nothing"])
    until(lambda: answers(dashboard), "the error")
    assert answers(dashboard)[0]["error"]
    assert dashboard.chat.messages[0]["attachments"][0]["name"] == "b>.png"


def test_too_large_a_file_shows_in_the_panel_and_is_not_said(dashboard):
    say(dashboard, "Look", files=[{"kind": "image", "name": "x.png"}], buffers=[bytes(LIMIT + 1)])
    until(lambda: "8.0 MiB together" in dashboard.chat.problem, "the error")
    assert dashboard.chat.messages == []


def test_stop_ends_the_answer_and_keeps_what_was_said(wb, dashboard):
    wb.policy = wb.policy.replace(generation={"min_new_tokens": 2000, "max_new_tokens": 2000})
    say(dashboard, "你是谁?")
    until(lambda: dashboard.chat.running.get("text"), "the first words")
    browser_sends(dashboard.chat, "stop")
    until(lambda: answers(dashboard), "the end")
    assert answers(dashboard)[0]["figures"]["finish"] == "cancelled"
    assert answers(dashboard)[0]["text"]


def test_a_new_conversation_starts_empty_and_the_old_one_can_be_opened_again(wb, dashboard):
    say(dashboard, "你是谁?")
    until(lambda: answers(dashboard), "the answer")
    browser_sends(dashboard.chat, "conversation", name="")
    until(lambda: dashboard.chat.state["conversation"] == "chat 2" and not dashboard.chat.messages, "an empty one")
    say(dashboard, "Who are you?")
    until(lambda: answers(dashboard), "the answer")
    assert {info.name for info in wb.conversations} == {"main", "chat 2"}
    browser_sends(dashboard.chat, "conversation", name="main")
    until(lambda: dashboard.chat.messages and dashboard.chat.messages[0]["text"] == "你是谁?", "the old one")


def test_a_dropped_conversation_says_that_the_model_forgot_it(wb, dashboard):
    say(dashboard, "你是谁?")
    until(lambda: answers(dashboard), "the answer")
    assert not dashboard.chat.state["forgotten"]
    browser_sends(dashboard.kv, "drop", conversation="main")
    until(lambda: dashboard.chat.state["forgotten"], "the mark")
    assert wb.conversations == ()
    say(dashboard, "你是谁?")
    until(lambda: len(answers(dashboard)) == 2 and not dashboard.chat.state["forgotten"], "a new beginning")


def test_two_dashboards_of_one_workbench_show_the_same_chat(wb, dashboard):
    other = Dashboard(wb, lang="zh")
    open_view(other)
    say(dashboard, "你是谁?")
    until(lambda: answers(dashboard) and answers(other), "both answers")
    assert other.chat.messages == dashboard.chat.messages
    other.close()


def test_what_code_asks_shows_in_the_chat_too_while_it_is_answered(wb, dashboard):
    seen = []
    dashboard.chat.observe(lambda change: seen.append(dict(change["new"])), "running")
    expected = wb.chat("How many icons are there?", image=png()).result(60)
    until(lambda: answers(dashboard), "the answer")
    assert answers(dashboard)[0]["text"] == expected.text
    assert answers(dashboard)[0]["figures"]["image_tokens"] == expected.usage.image_tokens
    question, _ = dashboard.chat.messages
    assert question["text"] == "How many icons are there?"
    assert (question["attachments"][0]["kind"], question["attachments"][0]["width"]) == ("image", 400)
    say(dashboard, "你是谁?")
    until(lambda: len(answers(dashboard)) == 2, "the next answer")
    assert [message["role"] for message in dashboard.chat.messages] == ["user", "assistant"] * 2


def test_a_sound_from_code_and_a_live_one_show_what_they_are(wb, dashboard):
    wb.chat(audio=np.zeros(8000, np.float32), conversation="main").result(60)
    live = wb.chat(live=True)
    live.feed(np.zeros(8000, np.float32))
    live.ask("你是谁?").result(60)
    until(lambda: len(answers(dashboard)) == 2, "both answers")
    shown = [message["attachments"][0] for message in dashboard.chat.messages if message["role"] == "user"]
    assert [(one["kind"], one["name"]) for one in shown] == [("audio", "audio"), ("audio", "live")]
    assert shown[0]["seconds"] == 0.5


def test_of_many_conversations_the_oldest_leave_the_chat(wb, dashboard):
    for number in range(MOST_CONVERSATIONS + 2):
        wb.chat("你是谁?", conversation=f"c{number}", max_new_tokens=1).result(60)
    transcript = transcript_of(wb)
    last = f"c{MOST_CONVERSATIONS + 1}"
    until(lambda: last in transcript.conversations() and "c1" not in transcript.conversations(), "the oldest to go")
    assert (transcript.conversations()[0], len(transcript.conversations())) == ("c2", MOST_CONVERSATIONS)


def test_a_closed_dashboard_hears_nothing(wb):
    first, second = Dashboard(wb), Dashboard(wb)
    first.close()
    assert len(wb.engine._listeners) == 1
    second.close()
    assert wb.engine._listeners == ()


def test_thinking_is_folded_away_beside_the_answer(wb, dashboard):
    say(dashboard, "你是谁?", thinking=True)
    until(lambda: answers(dashboard), "the answer")
    [answer] = answers(dashboard)
    assert answer["reasoning"]
    assert answer["reasoning"] not in answer["text"]
    assert answer["thought_seconds"] > 0


def test_generation_settings_reach_the_policy_and_no_other_setting_does(wb, dashboard):
    browser_sends(dashboard.chat, "generation", setting="max_new_tokens", value=7)
    browser_sends(dashboard.chat, "generation", setting="budget", value=7)
    until(lambda: wb.policy.generation.max_new_tokens == 7, "the setting")
    assert wb.policy == MemoryPolicy(generation={"max_new_tokens": 7})
