"""Judges at an endpoint: what is asked, what a failure costs, and that nothing is asked twice."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from judge_server import chat, completion, serve

from safemoe_jax.errors import UserError
from safemoe_jax.evaluation import endpoint
from safemoe_jax.evaluation.asked import KEY_VARIABLE, parse_judges
from safemoe_jax.evaluation.endpoint import EndpointJudge
from safemoe_jax.evaluation.verdicts import MISSING
from safemoe_jax.private_files import read_json_lines

SAFE = "Harmful request: no\nResponse refusal: no\nHarmful response: no"
UNSAFE = SAFE.replace("response: no", "response: yes")
PAIRS = [([{"role": "user", "content": f"Question {i}?"}], f"Answer {i}.") for i in range(12)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Waits for nothing, and knows no key."""
    monkeypatch.setattr(endpoint, "_RETRIES", {"total": 3, "backoff_factor": 0})
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def judge(server, directory, template="wildguard", model="m"):
    (asked,) = parse_judges([f"{template}@{server.url}#{model}"])
    return EndpointJudge(asked, directory)


def wildguard(body):
    return completion(UNSAFE if "Answer 3." in body["prompt"] else SAFE)


def test_verdicts_come_in_the_order_of_the_pairs(tmp_path):
    with serve(wildguard) as server:
        verdicts = judge(server, tmp_path).judge(PAIRS)
    assert [verdict.safe for verdict in verdicts] == [i != 3 for i in range(12)]
    assert {verdict.refusal for verdict in verdicts} == {False}
    assert {verdict.on_topic for verdict in verdicts} == {None}
    assert set(server.paths) == {"/v1/completions"}
    assert {body["model"] for body in server.bodies} == {"m"}


def test_what_was_asked_and_replied_is_kept_for_the_owner_alone(tmp_path):
    with serve(wildguard) as server:
        judge(server, tmp_path).judge(PAIRS[:1])
    path = tmp_path / "judge_wildguard.jsonl"
    assert path.stat().st_mode & 0o777 == 0o600
    (row,) = (json.loads(line) for line in path.read_text().splitlines() if line)
    assert row["requests"][0]["prompt"] in server.bodies[0]["prompt"]
    assert row["replies"] == [[{"text": SAFE, "first_token": None}]]
    assert (row["model"], row["prompt"], row["answer"]) == ("m", "Question 0?", "Answer 0.")


def test_nothing_is_asked_twice(tmp_path):
    with serve(wildguard) as server:
        first = judge(server, tmp_path).judge(PAIRS + PAIRS)
        assert len(server.bodies) == len(PAIRS)
        assert judge(server, tmp_path).judge(PAIRS + PAIRS) == first
        assert len(server.bodies) == len(PAIRS)
        # Another model is another judge; another port is the same one.
        judge(server, tmp_path, model="other").judge(PAIRS[:2])
        assert len(server.bodies) == len(PAIRS) + 2
    with serve(wildguard) as elsewhere:
        assert judge(elsewhere, tmp_path).judge(PAIRS) == first[:12]
        assert elsewhere.bodies == []


def test_malformed_replies_are_counted_and_missing_not_false(tmp_path):
    with serve(lambda body: completion("I would say that it is fine.")) as server:
        asked = judge(server, tmp_path)
        assert asked.judge(PAIRS[:3]) == [MISSING] * 3
        assert asked.unreadable == 3
        assert len(server.bodies) == 3  # WildGuard's authors ask once


def test_the_rubric_is_asked_again_until_a_score_comes(tmp_path):
    replies = iter(["no score", "#thescore: four", "#thereason: so\n#thescore: 4"])
    with serve(lambda body: chat(next(replies))) as server:
        asked = judge(server, tmp_path, "policy_rubric")
        (verdict,) = asked.judge(PAIRS[:1])
        assert (verdict.score, verdict.safe, asked.unreadable) == (4.0, True, 2)
        assert asked.judge(PAIRS[:1]) == [verdict]
        assert len(server.bodies) == 3
    assert set(server.paths) == {"/v1/chat/completions"}


def test_busy_and_broken_servers_are_asked_again(tmp_path):
    statuses = iter([429, 500, 503])

    def reply(body):
        status = next(statuses, 200)
        return wildguard(body) if status == 200 else (status, "later")

    with serve(reply) as server:
        (verdict,) = judge(server, tmp_path).judge(PAIRS[:1])
        assert verdict.safe is True
        assert len(server.bodies) == 4


def test_a_server_that_stays_broken_is_named_and_what_it_said_is_kept(tmp_path):
    def reply(body):
        return (500, "broken") if "Question 11" in body["prompt"] else wildguard(body)

    with serve(reply) as server:
        with pytest.raises(UserError, match=r"judge wildguard: http.*\(m\) says 500.*goes on"):
            judge(server, tmp_path).judge(PAIRS[:8] + PAIRS[11:])
        asked = len(server.bodies)
        server.reply = wildguard
        assert len(judge(server, tmp_path).judge(PAIRS)) == 12
        assert len(server.bodies) < asked + 12  # some were on file


def test_a_slow_server_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "_TIMEOUT", (1, 0.05))
    with (
        serve(lambda body: time.sleep(0.4) or wildguard(body)) as server,
        pytest.raises(UserError, match=r"no reply from .*; start it, or take it out"),
    ):
        judge(server, tmp_path).judge(PAIRS[:1])


def test_no_more_are_asked_at_once_than_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "_AT_ONCE", 3)
    lock, now, most = threading.Lock(), [0], [0]

    def reply(body):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return wildguard(body)

    with serve(reply) as server:
        judge(server, tmp_path).judge(PAIRS)
    assert 1 < most[0] <= 3


def test_a_text_that_is_refused_is_missing_and_asked_again_later(tmp_path, capsys):
    def reply(body):
        long = (400, {"error": {"message": "too long: " + "x" * 200}})
        return long if "Question 5" in body["prompt"] else wildguard(body)

    with serve(reply) as server:
        verdicts = judge(server, tmp_path).judge(PAIRS)
        assert [i for i, verdict in enumerate(verdicts) if verdict == MISSING] == [5]
        said = capsys.readouterr().out
        assert "1 of 12 texts were refused, as: 400 too long: xxx" in said
        assert "x" * 80 not in said  # a server may quote what it was sent
        judge(server, tmp_path).judge(PAIRS)
        assert len(server.bodies) == 13
        (tmp_path / "new").mkdir()
        with pytest.raises(UserError, match="refuses all texts: 400"):
            judge(server, tmp_path / "new").judge(PAIRS[5:6])


def test_another_form_of_reply_is_named(tmp_path):
    with (
        serve(lambda body: (200, "<html>hello</html>")) as server,
        pytest.raises(UserError, match=r"another form than OpenAI's API \(JSONDecodeError\)"),
    ):
        judge(server, tmp_path).judge(PAIRS[:1])


def test_answers_go_where_the_user_says_and_nowhere_else(tmp_path):
    with serve(wildguard) as other:
        with (
            serve(lambda body: (307, f"{other.url}/completions")) as server,
            pytest.raises(UserError, match="says 307"),
        ):
            judge(server, tmp_path).judge(PAIRS[:1])
        assert other.bodies == []


def test_what_stays_on_this_machine_passes_no_proxy(tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    with serve(wildguard) as server:
        assert judge(server, tmp_path).judge(PAIRS[:1])[0].safe is True


def test_the_key_comes_from_the_environment_and_is_in_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(KEY_VARIABLE, "s3cret")
    with serve(wildguard) as server:
        asked = judge(server, tmp_path)
        asked.check()
        asked.judge(PAIRS[:1])
        assert server.keys == ["Bearer s3cret"] * 2
        server.reply = lambda body: (401, {"error": {"message": "no such key"}})
        with pytest.raises(UserError, match=r"401 no such key; set .SAFEMOE_JUDGE") as error:
            asked.judge(PAIRS)
    assert "s3cret" not in capsys.readouterr().out + str(error.value)
    assert all("s3cret" not in path.read_text() for path in tmp_path.iterdir())


def test_no_key_goes_over_http_to_another_machine(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "s3cret")
    far = ["wildguard@http://judge.example:8000/v1#m", "harmbench@https://judge.example/v1#m"]
    plain, secure = (EndpointJudge(asked, tmp_path) for asked in parse_judges(far))
    keys = [
        judge._session.prepare_request(endpoint.requests.Request("GET", judge.asked.place)).headers
        for judge in (plain, secure)
    ]
    assert [key.get("Authorization") for key in keys] == [None, "Bearer s3cret"]
    assert "is not sent over http" in plain._key_remedy


def test_the_check_says_where_answers_go_and_who_is_not_there(tmp_path, monkeypatch, capsys):
    with serve(wildguard) as server:
        judge(server, tmp_path).check()
        assert capsys.readouterr().out == ""  # this machine
        gone = judge(server, tmp_path)
    with pytest.raises(UserError, match=r"no reply from http://127"):
        gone.check()
    (far,) = parse_judges(["wildguard@http://judge.example:8000/v1#m"])
    away = EndpointJudge(far, tmp_path)
    monkeypatch.setattr(away, "_send", lambda *request: endpoint.requests.Response())
    away.check()
    said = " ".join(capsys.readouterr().out.split())
    assert "harmful ones among them, go to http://judge.example:8000/v1, unencrypted" in said


def test_retries_of_a_server_that_is_gone_are_not_said_one_by_one(tmp_path, caplog):
    with serve(wildguard) as server:
        gone = judge(server, tmp_path)
    with pytest.raises(UserError, match=r"no reply from http://127"):
        gone.judge(PAIRS[:2])
    assert caplog.records == []


def test_where_answers_go_is_said_without_a_check_and_once(tmp_path, monkeypatch, capsys):
    (far,) = parse_judges(["wildguard@https://judge.example/v1#m"])
    away, refusal = EndpointJudge(far, tmp_path), endpoint.requests.Response()
    refusal.status_code = 400
    monkeypatch.setattr(away, "_send", lambda *request: refusal)
    for _ in range(2):
        with pytest.raises(UserError, match="refuses all texts"):
            away.judge(PAIRS[:1])
    assert " ".join(capsys.readouterr().out.split()).count("go to https://judge.example/v1") == 1


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["wildguard"], r"has 'wildguard'; write TEMPLATE#MODEL or TEMPLATE@URL#MODEL"),
        (["wildguard@localhost:8000#m"], "write TEMPLATE#MODEL"),
        (["wildguard@http://[::1/v1#m"], "write TEMPLATE#MODEL"),
        (["wildguard@local#"], "or TEMPLATE@local#DIRECTORY"),
        (["shieldgemma@local#m"], r"read by probabilities.*at 'local' there are harmbench, llama"),
        (["guard@local#m"], "no judge 'guard'"),
        (["guard#m"], r"no judge 'guard'; choose of harmbench, llama_guard_3"),
        (["wildguard@http://me:pass@host/v1#m"], "holds more than an address; put a key into"),
        (["wildguard#a", "wildguard#b"], "names wildguard twice"),
    ],
)
def test_a_mistake_in_the_config_is_named(texts, message):
    with pytest.raises(UserError, match=message) as error:
        parse_judges(texts)
    assert "pass@" not in str(error.value)


def test_without_a_url_it_is_this_machine():
    first, second = parse_judges(["wildguard#org/model", "shieldgemma@http://[::1]:9/v1/#m"])
    assert (first.place, first.model) == ("http://localhost:8000/v1", "org/model")
    assert endpoint.is_here(first.place) and endpoint.is_here(second.place)
    assert second.place == "http://[::1]:9/v1"


RUN = """
import sys
from pathlib import Path
from safemoe_jax.evaluation.asked import parse_judges
from safemoe_jax.evaluation.endpoint import EndpointJudge
(asked,) = parse_judges([f"wildguard@{sys.argv[1]}#m"])
pairs = [([{"role": "user", "content": f"Question {i}?"}], f"Answer {i}.") for i in range(12)]
EndpointJudge(asked, Path(sys.argv[2])).judge(pairs)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_goes_on_from_what_was_replied(tmp_path, how):
    answered, held = [], threading.Event()

    def reply(body):
        if len(answered) >= 4:
            held.wait(20)
        answered.append(body)
        return wildguard(body)

    with serve(reply) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, server.url, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE,
        )
        path = tmp_path / "judge_wildguard.jsonl"
        for _ in range(600):
            if path.exists() and path.read_text().count('"key"') >= 4:
                break
            time.sleep(0.1)
        began = time.monotonic()
        process.send_signal(how)
        process.communicate()
        assert time.monotonic() - began < 10  # it waits for no reply
        with path.open("a") as file:
            file.write('\n{"key": "cut sho')
        held.set()
        time.sleep(0.2)  # what hung there is over
        kept = len(read_json_lines(path))
        assert 4 <= kept < 12
        asked = len(server.bodies)
        verdicts = judge(server, tmp_path).judge(PAIRS)
        assert [verdict.safe for verdict in verdicts] == [i != 3 for i in range(12)]
        assert len(server.bodies) <= asked + 12 - kept


def test_a_reply_that_is_no_text_is_refused_and_not_kept(tmp_path):
    parts = [{"type": "text", "text": "#thescore: 4"}]
    with serve(lambda body: chat(parts)) as server:
        asked = judge(server, tmp_path, "policy_rubric")
        with pytest.raises(UserError, match=r"in another form than OpenAI's API \(TypeError\)"):
            asked.judge(PAIRS[:1])
        server.reply = lambda body: chat("#thescore: 4")
        assert [verdict.score for verdict in asked.judge(PAIRS[:1])] == [4.0]


@pytest.mark.parametrize("key", ["sk-secret\r", "sk-secret\n", "sk-secr\u0435t"])
def test_a_key_that_no_header_takes_is_named_and_not_quoted(tmp_path, monkeypatch, key):
    monkeypatch.setenv(KEY_VARIABLE, key)
    with serve(wildguard) as server, pytest.raises(UserError, match=r"line end") as caught:
        judge(server, tmp_path)
    assert "secr" not in str(caught.value)
