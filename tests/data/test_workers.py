import math
import multiprocessing
import os
import signal
import threading
import time

import pytest

from medattn_jax.data import workers


def test_every_job_is_answered_once():
  for jobs, processes in ((range(40), 2), ([9], 4), ([], 2)):
    answers = sorted(workers.answers(math.sqrt, jobs, processes))
    assert answers == [(n, math.sqrt(job)) for n, job in enumerate(jobs)]
  assert not multiprocessing.active_children()


def test_what_is_raised_in_a_process_is_raised_here():
  with pytest.raises(ValueError, match="math domain error") as error:
    list(workers.answers(math.sqrt, [1, -1, 4], 2))
  assert "_serve" in error.value.__notes__[0]  # where it was raised
  assert not multiprocessing.active_children()


def test_a_process_that_ends_costs_the_job_it_was_at():
  jobs = [0, 1, "one that ends it", 3, 4, 5, "another", 7, 8]
  answers = dict(workers.answers(exit_at_words, jobs, 2))
  died = {jobs[n] for n, answer in answers.items() if answer == workers.Died(7)}
  assert died == {"one that ends it", "another"}
  assert {n: answers[n] for n in answers if jobs[n] not in died} == {
    n: job for n, job in enumerate(jobs) if job not in died
  }


def exit_at_words(job):
  return os._exit(7) if isinstance(job, str) else job


@pytest.mark.parametrize("delay", [0.0, 0.005, 0.02, 0.2, 0.5])
def test_a_process_killed_at_any_moment_is_noticed(delay):
  """While it or another one starts, is handed a job, works or answers."""
  def kill():
    while not (children := multiprocessing.active_children()):
      time.sleep(0.001)
    time.sleep(delay)
    os.kill(children[0].pid, signal.SIGKILL)

  killer = threading.Thread(target=kill)
  killer.start()
  answers = dict(workers.answers(time.sleep, [0.02] * 60, 2))
  killer.join()
  died = [answer for answer in answers.values() if answer is not None]
  assert sorted(answers) == list(range(60)) and died == [workers.Died(-signal.SIGKILL)]


def test_one_that_asks_no_further_leaves_no_process():
  answers = workers.answers(time.sleep, [0.01] * 100, 2)
  next(answers)
  answers.close()
  assert not multiprocessing.active_children()
