"""The guards of this project and a bug for each, as somebody might make it one day; data only.

`bench_guards.py` puts them in one at a time and looks which test fails; `test_guards.py` sees that they still fit.
"""

from typing import NamedTuple


class Bug(NamedTuple):
    """One guard and one way to break it.

    Attributes:
        guard: what is guarded, in plain words.
        bug: what the bug does.
        file: where the guard stands, below the root.
        text: the guard itself, once in that file.
        instead: the text with the bug.
        tests: files or ids of tests below `tests/`, of which one should fail.
    """

    guard: str
    bug: str
    file: str
    text: str
    instead: str
    tests: tuple[str, ...]


LAYOUTS, LORA, STOCK = "test_lora_layouts.py::test_", "test_lora_file.py::test_", "test_lora_stock.py::test_"
SAVED, TRAINED, LIMITS = "test_checkpoint.py::test_", "test_train.py::test_", "test_limits.py::test_"
CACHE, CLIP, SETTINGS = "test_cache.py::test_", "test_clip.py::test_", "test_settings.py::test_"
PRIVATE, MODEL, COMMAND = "test_private.py::test_", "test_backbone.py::test_", "test_command.py::test_"
UNKNOWN = (f"{LAYOUTS}an_unknown_strength_is_an_error_that_an_option_settles[native]",)
READ_BACK = (f"{LAYOUTS}what_we_write_is_read_as_it_was_but_for_rounding",)
ODD = (f"{LORA}odd_contents_are_refused",)
VERIFIED = (f"{LAYOUTS}verify_finds_how_strongly_stock_diffusers_applies_it",)
OTHER_WIDTH = (f"{STOCK}a_lora_of_another_width_is_refused_with_both",)
SUBCOMMANDS = (f"{STOCK}the_subcommands_do_the_same",)
DAMAGE = (f"{SAVED}any_damage_is_known_and_the_one_before_is_used",)
KEPT = (f"{SAVED}what_was_saved_comes_back_and_two_of_each_stage_are_kept",)
DYING = (f"{SAVED}wherever_saving_dies_a_whole_checkpoint_is_last",)
FULL = (f"{SAVED}a_full_or_read_only_disk_is_a_sentence_and_the_state_is_as_before",)
SYNCED = (f"{SAVED}everything_is_on_the_disk_before_it_gets_its_name",)
BAD_STEPS = (f"{SAVED}bad_steps_are_counted_and_a_few_in_a_row_end_the_run",)
RESUMED = (f"{TRAINED}a_run_with_gradient_accumulation_resumes_bit_identical",)
STOPPED = (f"{TRAINED}a_stopped_and_resumed_run_ends_bit_identical[spatial-3-15-143]",)
CHANGED = (f"{TRAINED}a_changed_setting_that_matters_is_refused_by_name",)
ENDINGS = (f"{COMMAND}every_ending_has_its_exit_code",)
FAILING = (f"{LIMITS}a_decoder_that_fails_is_one_sentence_and_the_next_clip_is_read",)
INTERRUPTED = (f"{LIMITS}a_question_that_was_interrupted_gets_no_late_answer",)
AT_LIMIT = (f"{LIMITS}a_clip_at_a_limit_is_read_and_above_it_the_option_is_named",)
FRAMES = (f"{LIMITS}frames_have_their_limit_in_the_file_and_where_they_are_taken",)
ANIMATIONS = (f"{LIMITS}animations_and_folders_have_the_same_limits",)
LONG_CAPTION = (f"{LIMITS}a_long_caption_is_refused_not_cut",)
ONE_PROCESS = (f"{LIMITS}one_process_reads_all_clips_and_ends_with_its_program",)
BAD_FILE = (f"{SETTINGS}a_wrong_file_is_one_sentence",)
CHOKING = (f"{SETTINGS}a_file_that_yaml_or_python_would_choke_on_is_one_sentence",)
BAD_CLIP = (f"{CLIP}bad_input_is_one_sentence_and_leaves_nothing",)
PAGE = ("test_report.py::test_the_page_asks_for_nothing_and_captions_are_no_markup",)
SECRET = (f"{PRIVATE}a_key_in_a_setting_is_refused_and_one_in_an_error_is_not_shown",)
TOLD = (f"{PRIVATE}a_private_run_tells_no_caption_and_no_path_and_none_tells_a_key",)
STRICT = (f"{PRIVATE}deterministic_allows_only_operations_that_are_and_leaves_no_trace",)
NO_WAN = (f"{MODEL}what_is_no_wan_folder_is_refused_in_one_sentence",)
EARLY = (f"{TRAINED}what_cannot_work_is_refused_before_anything_is_written",)

LORA_FILES = [
    Bug(
        "an unknown alpha is refused", "the doubt is passed over", "heads/lora_strength.py",
        "            raise InputError(self.doubt)", "            return", UNKNOWN,
    ),
    Bug(
        "alphas of some modules alone are no strength", "they count as told", "heads/lora_strength.py",
        "partly = alphas and alphas.keys() != ranks.keys()", "partly = False", UNKNOWN,
    ),
    Bug(
        "two places that tell two strengths are refused", "nearly equal is taken for equal", "heads/lora_strength.py",
        "rel_tol=1e-6", "rel_tol=1.0", UNKNOWN,
    ),
    Bug(
        "a rank-stabilised LoRA acts as peft has it", "the root is forgotten", "heads/lora_strength.py",
        'power = 0.5 if fields.get("use_rslora") else 1.0', "power = 1.0",
        (f"{LAYOUTS}what_stands_beside_the_file_or_equals_the_rank_is_no_guess",),
    ),
    Bug(
        "a pattern in a header cannot hang the run", "patterns that repeat groups are tried", "heads/lora_strength.py",
        "    if slow is not None:", '    if slow == "":',
        (f"{LAYOUTS}a_pattern_that_could_take_for_ever_is_refused",),
    ),
    Bug(
        "alpha / rank is folded into the strength", "b stays as it is", "heads/motion_lora.py",
        "scale = self.alpha / self.rank", "scale = 1.0", READ_BACK,
    ),
    Bug(
        "what was folded is not scaled twice", "the old alpha stays", "heads/lora_write.py",
        "return replace(lora, weights=weights, rank=rank, alpha=float(rank))",
        "return replace(lora, weights=weights, rank=rank)", READ_BACK,
    ),
    Bug(
        "all modules of a native file have one rank", "smaller ones are not filled up", "heads/lora_write.py",
        "filled(a, b, rank) for module", "(a, b) for module",
        ("test_conformance.py::test_ranks_that_differ_are_one_rank_in_the_native_layout",),
    ),
    Bug(
        "a kohya file without all modules is refused", "missing ones are left out", "heads/lora_write.py",
        "    wrong = [name for name in needed if name not in modules] + ", "    wrong = ",
        (f"{LAYOUTS}kohya_is_filled_with_zeros_or_refused_with_the_reason",),
    ),
    Bug(
        "mixed layouts are refused", "the first layout that knows a key is taken", "heads/lora_layouts.py",
        "if len(names) == len(tensors)), None)", "if names), None)", ODD,
    ),
    Bug(
        "one weight under two names is refused", "the last one is taken", "heads/lora_layouts.py",
        "if orphans or len(weights) + len(alphas) < len(tensors):", "if orphans:", ODD,
    ),
    Bug(
        "half a pair is refused", "it is left out", "heads/motion_lora.py",
        "for module, parts in found.items()}", "for module, parts in found.items() if len(parts) == 2}",
        ("test_lora.py::test_load_names_the_weight_that_does_not_belong",),
    ),
    Bug(
        "NaN in a file is refused", "only integers are", "heads/lora_file.py",
        "if not value.is_floating_point() or not torch.isfinite(value.float()).all():",
        "if not value.is_floating_point():", ODD,
    ),
    Bug(
        "a header larger than the format allows is refused", "megabytes are compared with bytes", "heads/lora_file.py",
        "if claimed > LIBRARY_HEADER:", "if claimed / MB > LIBRARY_HEADER:",
        (f"{LAYOUTS}a_header_that_claims_ten_gigabytes_is_refused_by_one_sentence",),
    ),
    Bug(
        "a header above the limit is refused", "the unit is divided out twice", "heads/lora_file.py",
        '"header_mb", claimed / MB,', '"header_mb", claimed / MB / MB,',
        (f"{LIMITS}a_header_at_the_limit_is_read",),
    ),
    Bug(
        "a LoRA file is sized up before it is read", "it is read at once", "heads/lora_file.py",
        "        _refuse_large(path)\n", "",
        (f"{LAYOUTS}a_header_that_claims_ten_gigabytes_is_refused_by_one_sentence",
         f"{LIMITS}a_sparse_file_of_a_terabyte_is_refused_by_its_size"),
    ),
    Bug(
        "numbers beyond the range of fp16 are not saved", "the unrounded ones are looked at", "heads/lora_file.py",
        "if not rounded[key].isfinite().all():", "if not value.isfinite().all():",
        (f"{LORA}bad_numbers_unknown_layouts_and_bad_places_leave_no_file",),
    ),
    Bug(
        "a finished LoRA is on the disk before it has its name", "no fsync", "heads/lora_file.py",
        "        os.fsync(file.fileno())  #", "        pass  #",
        (f"{LORA}a_failed_write_keeps_the_old_file",),
    ),
    Bug(
        "a model of another width is refused", "only a narrower one is", "heads/lora_layers.py",
        "a.shape[1] == b.shape[0] != width:", "a.shape[1] == b.shape[0] > width:", OTHER_WIDTH,
    ),
    Bug(
        "a module that the model has not got is refused", "it is left out", "heads/lora_layers.py",
        'raise InputError(f"{came}, which this model of {len(layers)} blocks does not have: {cure}") from None',
        "continue",
        ("test_lora.py::test_load_names_the_weight_that_does_not_belong",),
    ),
    Bug(
        "LoRAs that end at different noise levels are not merged", "two levels pass", "heads/lora_combine.py",
        "if len(set(ends)) > 1:", "if len(set(ends)) > 2:",
        (f"{STOCK}a_merged_lora_rests_where_all_its_parts_do_or_is_refused",),
    ),
    Bug(
        "the file that is written is not the file that is read", "no source is compared", "train/lora_commands.py",
        "for source in sources):", "for source in sources[1:]):", SUBCOMMANDS,
    ),
    Bug(
        "the file that is written is not the file that is read", "their names are compared", "train/lora_commands.py",
        "out.exists() and out.samefile(source)", "out == source", SUBCOMMANDS,
    ),
    Bug(
        "verify notices a file without effect", "it counts as right", "heads/lora_verify.py",
        "        if not self.changed:", "        if self.changed < 0:",
        (f"{STOCK}verify_tells_a_file_without_effect",),
    ),
    Bug(
        "verify notices another strength in stock diffusers", "outputs are not compared", "heads/lora_verify.py",
        "not refusal and changed > 0 and differs <= within", "not refusal and changed > 0", VERIFIED,
    ),
    Bug(
        "verify tells that stock diffusers finds no key", "silence counts as loaded", "heads/lora_verify.py",
        'refusal = refusal or ("" if updates else "it finds no key that it knows")', 'refusal = refusal or ""',
        VERIFIED,
    ),
]  # fmt: skip

NOTHING_LOST = [
    Bug(
        "a checkpoint is known to be damaged by its hashes", "those of the moments are not compared",
        "train/checkpoint.py", "for name in (LORA, MOMENTS):", "for name in (LORA,):", DAMAGE,
    ),
    Bug(
        "a checkpoint is known to be damaged by its hashes", "that of the state is not compared", "train/checkpoint.py",
        'if state.get("hash") != _hash_of(rest):', 'if "hash" not in state:', DAMAGE,
    ),
    Bug(
        "a checkpoint under another's name is known", "its stage alone is looked at", "train/checkpoint.py",
        "if loaded.name != path.name:", "if loaded.stage not in path.name:",
        (f"{SAVED}a_checkpoint_under_anothers_name_is_damaged",),
    ),
    Bug(
        "of damaged checkpoints the one before is used", "the first one is looked at first", "train/checkpoint.py",
        "for path in reversed(found):", "for path in found:", DAMAGE,
    ),
    Bug(
        "without a whole checkpoint nothing begins anew in silence", "it does", "train/checkpoint.py",
        '    if found:\n        raise StorageError(f"No checkpoint of',
        '    if not folder:\n        raise StorageError(f"No checkpoint of',
        (f"{SAVED}without_a_whole_checkpoint_nothing_is_begun_anew_in_silence",),
    ),
    Bug(
        "a checkpoint gets its name when it is whole", "before its files are written", "train/checkpoint.py",
        "        for name, content in parts.items():\n"
        "            _write_through(unfinished / name, content)\n"
        "        _sync_folder(unfinished)\n"
        "        if target.exists():\n"
        "            _remove(target)\n"
        "        os.replace(unfinished, target)\n",
        "        if target.exists():\n"
        "            _remove(target)\n"
        "        os.replace(unfinished, target)\n"
        "        for name, content in parts.items():\n"
        "            _write_through(target / name, content)\n",
        DYING,
    ),
    Bug(
        "a checkpoint is on the disk before it gets its name", "no fsync of its files", "train/checkpoint.py",
        "        file.flush()\n        os.fsync(file.fileno())\n", "        file.flush()\n", SYNCED,
    ),
    Bug(
        "a checkpoint is on the disk before it gets its name", "no fsync of its folder", "train/checkpoint.py",
        "        _sync_folder(unfinished)\n", "", SYNCED,
    ),
    Bug(
        "the name of a checkpoint is on the disk", "no fsync after the rename", "train/checkpoint.py",
        "        _sync_folder(folder)\n", "", SYNCED,
    ),
    Bug(
        "retention keeps the last good ones", "it keeps the first", "train/checkpoint.py",
        "checkpoints(folder, checkpoint.stage)[:-keep]", "checkpoints(folder, checkpoint.stage)[keep:]", KEPT,
    ),
    Bug(
        "retention keeps the last good ones", "one too few", "train/checkpoint.py",
        "checkpoints(folder, checkpoint.stage)[:-keep]",
        "checkpoints(folder, checkpoint.stage)[: -keep + 1 or None]", KEPT,
    ),
    Bug(
        "retention is of each stage", "the last stage drops the other's", "train/checkpoint.py",
        "checkpoints(folder, checkpoint.stage)[:-keep]", "checkpoints(folder)[:-keep]", KEPT,
    ),
    Bug(
        "a checkpoint that is removed is gone at once", "it is deleted file by file", "train/checkpoint.py",
        "    os.replace(path, gone)\n    shutil.rmtree(gone)\n", "    shutil.rmtree(path)\n", DYING,
    ),
    Bug(
        "a full disk is a storage error", "the error of the system comes through", "train/checkpoint.py",
        "except (OSError, SafetensorError) as error:\n        shutil",
        "except SafetensorError as error:\n        shutil", FULL,
    ),
    Bug(
        "a full disk leaves the state as it was", "tidying up takes all checkpoints", "train/checkpoint.py",
        "shutil.rmtree(unfinished, ignore_errors=True)", "shutil.rmtree(folder, ignore_errors=True)", FULL,
    ),
    Bug(
        "resuming restores the moments of the optimiser", "they begin at 0", "train/loop.py",
        "        restore_moments(stepper.optimizer, list(layers.named()), moments)\n", "        pass\n", RESUMED,
    ),
    Bug(
        "resuming restores the generator", "it goes on from wherever it was", "train/loop.py",
        "            restore_random(start.random)\n", "", RESUMED,
    ),
    Bug(
        "resuming goes on at the position that was saved", "at the first step", "train/loop.py",
        "for step in range(first, stage.settings.steps):", "for step in range(stage.settings.steps):", RESUMED,
    ),
    Bug(
        "resuming takes the saved weights", "it begins with new ones", "train/loop.py",
        "        layers.load(start.lora)\n", "        pass\n", RESUMED,
    ),
    Bug(
        "noise follows from seed, step and batch alone", "it comes from the global generator", "train/loop.py",
        'keyed_generator(*key, "clip")), keyed_generator(*key)',
        'keyed_generator(*key, "clip")), torch.default_generator',
        STOPPED,
    ),
    Bug(
        "every accumulated batch has its own noise", "all have that of the first", "train/loop.py",
        "sample = micro * accelerator.num_processes + accelerator.process_index", "sample = accelerator.process_index",
        ("test_launchers.py::test_two_processes_do_what_one_does_with_twice_the_batches",),
    ),
    Bug(
        "a step is taken when all its batches are in", "gradients are dropped between them", "train/loop.py",
        "            optimizer.zero_grad()\n", '            model.transformer.zero_grad()\n',
        ("test_launchers.py::test_two_processes_do_what_one_does_with_twice_the_batches",),
    ),
    Bug(
        "a NaN is known as a bad step", "only the loss is looked at", "train/bad_steps.py",
        "bad = not (math.isfinite(value) and math.isfinite(size))", "bad = not math.isfinite(value)", BAD_STEPS,
    ),
    Bug(
        "a bad step is skipped", "it is taken", "train/loop.py",
        "if good := run.bad.good(step, parts.total, norm, accelerator):",
        "if (good := run.bad.good(step, parts.total, norm, accelerator)) or step:",
        (f"{TRAINED}one_bad_step_is_skipped_and_written_down",),
    ),
    Bug(
        "a bad step leaves nothing behind", "its gradients stay", "train/loop.py",
        "                    optimizer.step()\n            optimizer.zero_grad()\n",
        "                    optimizer.step()\n                    optimizer.zero_grad()\n",
        (f"{TRAINED}one_bad_step_is_skipped_and_written_down",),
    ),
    Bug(
        "bad steps are counted", "they are not", "train/bad_steps.py", "        self.total += 1\n", "", BAD_STEPS,
    ),
    Bug(
        "a few bad steps in a row end the run", "one more is let through", "train/bad_steps.py",
        "if self.in_a_row >= LIMIT or taken:", "if self.in_a_row > LIMIT or taken:", BAD_STEPS,
    ),
    Bug(
        "only bad steps in a row end the run", "all of them count", "train/bad_steps.py",
        "            self.in_a_row = 0\n", "            pass\n", BAD_STEPS,
    ),
    Bug(
        "bad numbers have exit code 4", "that of a bug", "train/endings.py",
        "            return 4, str(error)", "            return 1, str(error)", ENDINGS,
    ),
    Bug(
        "a full disk has exit code 3", "it is taken for a bug", "train/endings.py",
        "case OSError(errno=number) if number in STORAGE:",
        "case OSError(errno=number) if number not in STORAGE:", ENDINGS,
    ),
    Bug(
        "SIGTERM saves first", "only Ctrl-C is heard", "train/loop.py",
        "for number in (signal.SIGINT, signal.SIGTERM):", "for number in (signal.SIGINT,):", STOPPED,
    ),
    Bug(
        "a run that is stopped saves first", "it waits for the next checkpoint", "train/loop.py",
        "if code or done % settings.checkpoint_every == 0 or", "if done % settings.checkpoint_every == 0 or",
        (f"{TRAINED}a_stopped_and_resumed_run_ends_bit_identical[spatial-1-2-130]",),
    ),
    Bug(
        "a changed setting is refused on resuming", "a checkpoint is not compared", "train/run.py",
        '        refuse_changes(start.identity, made_of, stage=name, what=f"Checkpoint {start.name}")\n', "", CHANGED,
    ),
    Bug(
        "a changed setting is refused on resuming", "one that matters counts as irrelevant", "train/identity.py",
        '"expert", "clips", "together",', '"expert", "clips", "together", "temporal.motion",', CHANGED,
    ),
    Bug(
        "a folder that holds a run is not begun anew", "it is", "train/refusals.py",
        "if used and not settings.resume:", "if used and settings.resume:",
        (f"{TRAINED}a_finished_run_is_not_done_again_and_a_folder_in_use_is_refused",),
    ),
    Bug(
        "the log of a run holds each step once", "steps beyond the checkpoint stay", "train/journal.py",
        "if _step_of(line) <= steps]", 'if _step_of(line) < float("inf")]',
        (f"{TRAINED}going_back_to_a_named_checkpoint_ends_bit_identical",),
    ),
    Bug(
        "a second run in a folder is refused", "the system's answer is passed over", "train/lock.py",
        "    except BlockingIOError:\n        return False\n", "    except BlockingIOError:\n        return True\n",
        (f"{SAVED}a_second_run_in_the_folder_is_refused_with_owner_and_age",),
    ),
    Bug(
        "a second run in a folder is refused", "the lock is a shared one", "train/lock.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB",
        (f"{SAVED}a_second_run_in_the_folder_is_refused_with_owner_and_age",),
    ),
    Bug(
        "the lock of a dead run is known as stale", "it locks for ever", "train/lock.py",
        "if not locked or (owner and elsewhere and silent < SILENCE):", "if not locked or owner:",
        (f"{SAVED}the_lock_of_a_killed_run_is_known_as_stale",),
    ),
    Bug(
        "an owner on another machine lives by its signs", "they are not looked at", "train/lock.py",
        "if not locked or (owner and elsewhere and silent < SILENCE):", "if not locked:",
        (f"{SAVED}an_owner_on_another_machine_lives_by_its_signs",),
    ),
    Bug(
        "a run gives signs of life", "it gives none", "train/lock.py",
        "            os.utime(path)\n", "            path.stat()\n",
        (f"{SAVED}a_run_gives_signs_of_life",),
    ),
    Bug(
        "a damaged cache entry is known on reading", "damage comes through", "data/cache.py",
        "except (SafetensorError, ValueError, KeyError) as fault:", "except (ValueError, KeyError) as fault:",
        (f"{CACHE}damaged_file_is_removed_said_and_made_anew",),
    ),
    Bug(
        "a changed number in the cache is known on reading", "hashes are not compared", "data/cache.py",
        '.get("sha256") != _hash_of(tensors)', '.get("sha256") is None',
        (f"{CACHE}damaged_file_is_removed_said_and_made_anew",),
    ),
    Bug(
        "a file takes its place when it is whole", "it is written in its place", "data/cache.py",
        "        yield draft\n        os.replace(draft, path)\n", "        yield path\n",
        (f"{CACHE}replacing_keeps_the_old_file_until_the_new_one_is_whole",),
    ),
    Bug(
        "two processes may write one file", "both write to one draft", "data/cache.py",
        'f".{path.stem}.{uuid.uuid4().hex[:12]}{path.suffix}"',
        'f".{path.stem}.{uuid.NAMESPACE_DNS.hex[:12]}{path.suffix}"',
        (f"{CACHE}two_writers_of_one_file_do_not_meet",),
    ),
]  # fmt: skip

NOTHING_IN_SILENCE = [
    Bug(
        "a decoder that hangs is ended", "the timer is not started", "data/reading_process.py",
        "    clock.start()\n", "", FAILING,
    ),
    Bug(
        "a decoder that hangs is told from one that dies", "both count as death", "data/reading_process.py",
        "lambda: (late.set(), process.kill())", "process.kill", FAILING,
    ),
    Bug(
        "the timer ends with its question", "it kills the reading of a later clip", "data/reading_process.py",
        "        clock.cancel()\n", "        pass\n", (f"{LIMITS}the_clock_of_one_clip_does_not_end_the_next",),
    ),
    Bug(
        "a question that was interrupted gets no late answer", "its process answers the next one",
        "data/reading_process.py", "    except BaseException:\n        _end(process)\n        raise\n",
        "    except BaseException:\n        raise\n", INTERRUPTED,
    ),
    Bug(
        "a process that died is begun anew", "the dead one is asked", "data/reading_process.py",
        "if process is not None and process.poll() is None:", "if process is not None:", FAILING,
    ),
    Bug(
        "threads ask one after the other", "they talk at once", "data/reading_process.py",
        "    with _LOCK:\n        answer",
        "    with suppress():\n        answer", (f"{LIMITS}threads_get_each_their_own_answer",),
    ),
    Bug(
        "files in the working folder are no libraries", "they are imported", "data/reading_process.py",
        'READER = [sys.executable, "-P", "-m",', 'READER = [sys.executable, "-m",', ONE_PROCESS,
    ),
    Bug(
        "pixels that end early are no clip", "the rest is what memory held", "data/reading_process.py",
        "    if pipe.readinto(pixels.reshape(-1).data) < pixels.size:\n",
        "    if not pipe.readinto(pixels.reshape(-1).data):\n",
        (f"{LIMITS}pixels_that_end_early_are_no_clip",),
    ),
    Bug(
        "the memory of the reading process is bounded", "no bound is set", "data/reading.py",
        "        _bound_memory(allowed.memory_mb)\n", "", FAILING,
    ),
    Bug(
        "the memory of the reading process is bounded", "by a million times as much", "data/reading.py",
        "wanted = (clip_mb + WORKSPACE_MB) * MB", "wanted = (clip_mb + WORKSPACE_MB) * MB * MB", FAILING,
    ),
    Bug(
        "too little memory is a sentence", "it is a bug of ours", "data/reading.py",
        "    except MemoryError:\n", "    except BufferError:\n", FAILING,
    ),
    Bug(
        "a limit is refused from above it on", "from twice on", "data/limits.py",
        "        if came > allowed:\n", "        if came > 2 * allowed:\n", AT_LIMIT,
    ),
    Bug(
        "a clip at a limit is read", "it is refused", "data/limits.py",
        "        if came > allowed:\n", "        if came >= allowed:\n", AT_LIMIT,
    ),
    Bug(
        "a file that is too large is refused", "megabytes are divided out twice", "data/reading.py",
        '"file_mb", facts.st_size / MB,', '"file_mb", facts.st_size / MB / MB,',
        (f"{LIMITS}a_sparse_file_of_a_terabyte_is_refused_by_its_size",),
    ),
    Bug(
        "a clip of too many frames is refused", "only those that are taken count", "data/video.py",
        '"frames", len(spans), f"', '"frames", 0, f"', FRAMES,
    ),
    Bug(
        "too many frames are not taken", "only those of the file count", "data/frames.py",
        '"frames", count, f"', '"frames", 0, f"', FRAMES,
    ),
    Bug(
        "an animation of too many frames is refused", "only those that are taken count", "data/pictures.py",
        '"frames", count, f"', '"frames", 0, f"', ANIMATIONS,
    ),
    Bug(
        "a folder of too many pictures is refused", "only those that are taken count", "data/pictures.py",
        '"frames", len(paths), f"', '"frames", 0, f"', ANIMATIONS,
    ),
    Bug(
        "frames of too many pixels are not decoded", "sides are added", "data/frames.py",
        '"pixels", height * width, what', '"pixels", height + width, what', AT_LIMIT,
    ),
    Bug(
        "a clip larger than the memory allowed is refused", "a picture is counted once", "data/reading.py",
        '"memory_mb", np.prod(shape, dtype=float) / MB', '"memory_mb", np.prod(shape[1:], dtype=float) / MB', AT_LIMIT,
    ),
    Bug(
        "a caption that is too long is refused", "it is not", "data/reading.py",
        '"caption", len(caption), f"', '"caption", 0, f"', LONG_CAPTION,
    ),
    Bug(
        "a caption that is too long is refused", "it is cut", "data/reading.py",
        "file.read(limits().caption + 1)", "file.read(limits().caption)", LONG_CAPTION,
    ),
    Bug(
        "a caption longer than the text encoder takes is refused", "it is cut", "heads/wan_parts.py",
        "    if tokens > most:\n", "    if tokens > 100 * most:\n", (f"{MODEL}wrong_calls_are_refused",),
    ),
    Bug(
        "frames that are not 4k + 1 are refused", "4k passes", "data/frames.py",
        "if frames >= 1 and frames % 4 == 1:", "if frames >= 1 and frames % 4 <= 1:",
        (f"{CLIP}frames_are_4k_plus_1",),
    ),
    Bug(
        "frames that the VAE would drop are refused", "they are not", "heads/wan.py",
        'raise InputError(f"The model takes {self.frame_multiple}k + 1 frames, got {frames}: cut to {nearest}.")',
        "return", (f"{MODEL}frames_that_the_vae_would_drop_are_refused",),
    ),
    Bug(
        "what cannot work is refused before a model is loaded", "a stride is not", "train/refusals.py",
        "        check_stride(settings.frames, settings.temporal.stride)\n", "        pass\n", EARLY,
    ),
    Bug(
        "damage in a clip is looked for", "the decoder paints over it", "data/reading.py",
        "    footage.check(float(footage.stamps[chosen[-1]]))\n", "", BAD_CLIP,
    ),
    Bug(
        "a video that broke off is known", "its length is not compared", "data/video.py",
        "if spans and (short or not whole):", "if spans and not whole:", BAD_CLIP,
    ),
    Bug(
        "a playlist opens no other file", "every container is read", "data/video.py",
        'OPEN = {"format_whitelist": "mov,matroska,webm,gif", "protocol_whitelist": "file"}',
        "OPEN: dict[str, str] = {}",
        (f"{LIMITS}a_playlist_opens_no_other_file",),
    ),
    Bug(
        "YAML is loaded safely", "tags run code", "data/yaml_file.py",
        "class Loader(yaml.SafeLoader):", "class Loader(yaml.UnsafeLoader):", BAD_FILE,
    ),
    Bug(
        "YAML that is nested too deeply is refused", "it is a traceback", "data/yaml_file.py",
        "    except RecursionError:\n", "    except BufferError:\n", CHOKING,
    ),
    Bug(
        "aliases that hold themselves are refused", "they count as nothing", "data/yaml_file.py",
        "known[id(node)] = math.inf", "known[id(node)] = 0", CHOKING,
    ),
    Bug(
        "a key twice in a file is refused", "the last one counts", "data/yaml_file.py",
        'if name in values.places and name != "<<":', "if name == values.places:", BAD_FILE,
    ),
    Bug(
        "a file too large for settings is refused", "it is cut", "data/yaml_file.py",
        "file.read(LARGEST + 1)", "file.read(LARGEST)", CHOKING,
    ),
    Bug(
        "captions are no markup on the page", "tags are left", "infer/report.py",
        r'for sign in "<>&\u2028\u2029":', r'for sign in "&\u2028\u2029":', PAGE,
    ),
    Bug(
        "captions are no markup in a table", "tags are left", "infer/table_text.py",
        '.replace("<", "&lt;")', "", PAGE,
    ),
    Bug(
        "captions are no markup in a plot", "tags are left", "infer/plot.py",
        "{escape(text)}", "{text}", ("test_ablation.py::test_a_plot_shows_what_there_is_and_names_what_there_is_not",),
    ),
    Bug(
        "keys are known by the names of their variables", "API keys are not", "infer/private.py",
        "(TOKEN|KEY|SECRET|", "(TOKEN|SECRET|", SECRET,
    ),
    Bug(
        "a key within a longer one is hidden with it", "the shorter one first", "infer/private.py",
        "key=lambda item: -len(item[1])", "key=lambda item: len(item[1])", SECRET,
    ),
    Bug(
        "a sentence quotes no key", "it is told as it came", "train/endings.py",
        'return code, without_secrets(" ".join(sentence.split()))', 'return code, " ".join(sentence.split())', SECRET,
    ),
    Bug(
        "a traceback quotes no key", "it is printed as it came", "train/endings.py",
        'print(without_secrets("".join(traceback.format_exception(error))),',
        'print("".join(traceback.format_exception(error)),', SECRET,
    ),
    Bug(
        "a setting that holds a key is refused", "it is written into files", "train/refusals.py",
        '    refuse_secrets(settings.model_dump(mode="json"))\n', "", SECRET,
    ),
    Bug(
        "a private run tells no caption", "its settings do", "train/private.py",
        "for name in (*PATHS, *WORDS)}\n", "for name in PATHS}\n", TOLD,
    ),
    Bug(
        "a private run tells no caption", "all that is made of the clip does", "train/private.py",
        "    if not private:\n        return clip.caption\n",
        "    if clip.caption:\n        return clip.caption\n", TOLD,
    ),
    Bug(
        "the mark of a private caption cannot be guessed", "it is the hash of the words", "train/private.py",
        "sha256(clip.pixels.tobytes() + clip.caption.encode())", "sha256(clip.caption.encode())",
        (f"{PRIVATE}the_mark_of_a_private_caption_cannot_be_guessed",),
    ),
    Bug(
        "a private run tells a tracker no path", "wandb keeps the command line", "train/journal.py",
        'wandb |= {"settings": QUIET_WANDB} if settings.private else', "wandb |= {} if settings.private else", TOLD,
    ),
    Bug(
        "the header of a LoRA names no path", "it does", "train/run.py",
        'exclude={*PATHS, "together"}', 'exclude={"together"}', (f"{TRAINED}the_file_knows_how_it_was_made",),
    ),
    Bug(
        "an image-to-video model is refused", "its picture embedding is passed over", "heads/wan_folder.py",
        'if inputs != outputs or config.get("image_dim") is not None:', "if inputs != outputs:", NO_WAN,
    ),
    Bug(
        "an image-to-video model is refused", "its channels are passed over", "heads/wan_folder.py",
        'if inputs != outputs or config.get("image_dim") is not None:',
        'if config.get("image_dim") is not None:', NO_WAN,
    ),
    Bug(
        "an image-to-video CogVideoX is refused", "its channels are passed over", "heads/wan_folder.py",
        'pictures = config.get("in_channels", 16) != config.get("out_channels", 16) or config.get("ofs_embed_dim")',
        'pictures = config.get("ofs_embed_dim")',
        ("test_cogvideox.py::test_other_models_of_the_family_are_refused_with_what_is_supported",),
    ),
    Bug(
        "a model with weights missing is refused", "they stay as they were drawn", "heads/wan_parts.py",
        'absent = sorted(set(report["missing_keys"]) | ', "absent = sorted(set() | ", NO_WAN,
    ),
    Bug(
        "a damaged model is a sentence", "the library's error comes through", "heads/wan_folder.py",
        "        except (SafetensorError, OSError) as error:", "        except OSError as error:", NO_WAN,
    ),
    Bug(
        "an error of the hub is a sentence", "it comes through", "heads/wan_folder.py",
        "patterns))\n    except (OSError, ValueError) as error:", "patterns))\n    except ValueError as error:",
        (f"{MODEL}a_hub_id_that_is_not_here_is_refused",),
    ),
    Bug(
        "a deterministic run allows only what is", "everything is allowed", "train/deterministic.py",
        "    torch.use_deterministic_algorithms(True)\n", "", STRICT,
    ),
    Bug(
        "a deterministic run leaves no trace", "the switch stays", "train/deterministic.py",
        "        torch.use_deterministic_algorithms(before[0])\n", "", STRICT,
    ),
    Bug(
        "--deterministic reaches the run", "it is not passed on", "train/run.py",
        "deterministic(settings.deterministic),", "deterministic(False),", STRICT,
    ),
]  # fmt: skip

COMPILED, OPTIMISER = "test_compiled.py::test_", "test_optimizer.py::test_"
SAME_BLOCKS = (f"{COMPILED}both_stages_learn_the_same_by_compiled_blocks",)
LEFT = (f"{COMPILED}nothing_is_left_behind",)
BEGUN = (f"{COMPILED}a_run_goes_on_as_it_was_begun_and_older_ones_count_as_plain",)
UNCOMPILABLE = (f"{COMPILED}clips_that_cannot_be_made_by_compiled_blocks_are_refused",)
SPLIT = ("test_launchers.py::test_fsdp2_ends_where_two_plain_processes_do_and_resumes_bit_identically[changes0]",)
DIFFERENT_KERNELS = [
    Bug(
        "--compile reaches the run", "it is not passed on", "train/loop.py",
        "compiled(model.transformer, settings.compile)", "compiled(model.transformer, False)", SAME_BLOCKS,
    ),
    Bug(
        "compiled blocks are plain again after the run", "they stay", "heads/compiled.py",
        "            block._compiled_call_impl = None\n", "            pass\n", LEFT,
    ),
    Bug(
        "blocks that would go on uncompiled are an error", "torch warns and goes on", "heads/compiled.py",
        "fail_on_recompile_limit_hit=True", "fail_on_recompile_limit_hit=False",
        (f"{COMPILED}blocks_that_would_go_on_uncompiled_are_an_error",),
    ),
    Bug(
        "a machine without a compiler is a sentence", "torch's error comes through", "heads/compiled.py",
        "except (TorchDynamoException, FailOnRecompileLimitHit) as error:", "except FailOnRecompileLimitHit as error:",
        (f"{COMPILED}without_a_compiler_one_sentence_says_what_to_do",),
    ),
    Bug(
        "clips on the way are made by plain blocks", "they are compiled, too", "train/loop.py",
        "                with plain():\n", "                if True:\n",
        (f"{COMPILED}clips_on_the_way_are_made_by_the_plain_blocks",),
    ),
    Bug(
        "a run goes on with the kernels it was begun with", "any will do", "train/identity.py",
        '"expert", "clips", "together",\n', '"expert", "clips", "together", "compile",\n', BEGUN,
    ),
    Bug(
        "older runs go on", "what they do not name is a change", "train/identity.py",
        "            del kept[name]\n", "            pass\n", BEGUN,
    ),
    Bug(
        "no clip is made by compiled blocks that a guidance looks into", "it is tried", "infer/order.py",
        '"--guidance": not isinstance(settings.guidance, NoGuidance)', '"--guidance": False', UNCOMPILABLE,
    ),
    Bug(
        "blocks whose weights wait elsewhere are not compiled", "it is tried", "train/refusals.py",
        "if settings.compile and settings.memory in ROUNDED:", "if settings.compile and settings.memory == 'lowest':",
        (f"{COMPILED}what_does_not_go_with_compiled_blocks_is_refused",),
    ),
    Bug(
        "auto takes nothing that cannot be compiled", "it takes lowest", "train/memory.py",
        '("fast", "low") if settings.compile else AUTO', "AUTO",
        (f"{COMPILED}auto_does_not_take_what_cannot_be_compiled",),
    ),
    Bug(
        "FSDP2 goes on with the moments of a checkpoint", "they are zero", "train/fsdp.py",
        'moments[f"{name}|{moment}"].to(weight.device)', '0 * moments[f"{name}|{moment}"].to(weight.device)', SPLIT,
    ),
    Bug(
        "FSDP2 goes on with a checkpoint's number of steps", "it begins with none", "train/fsdp.py",
        '{"step": moments[f"{name}|step"].clone(), **state}', '{"step": 0 * moments[f"{name}|step"], **state}', SPLIT,
    ),
    Bug(
        "a launcher that asks for FSDP2 gets it", "DDP runs without a word", "train/fsdp.py",
        "        fully_shard(part, mesh=mesh)\n", "        pass\n", SPLIT,
    ),
    Bug(
        "FSDP1 is refused", "it is taken for FSDP2", "train/fsdp.py",
        'os.environ.get("FSDP_VERSION", "1") != "2"', 'os.environ.get("FSDP_VERSION", "2") != "2"',
        ("test_launchers.py::test_a_launcher_that_cannot_work_is_refused",),
    ),
    Bug(
        "a second stage of FSDP2 needs a start of its own", "it is begun", "train/launch.py",
        "if not is_sharded(accelerator) and (plugin is None or plugin.zero_stage < 3):",
        "if plugin is None or plugin.zero_stage < 3:", ("test_launchers.py::test_what_fsdp2_cannot_do_is_refused",),
    ),
    Bug(
        "what is split over processes gets no other optimiser", "it does", "train/launch.py",
        '(settings.compile or settings.optimizer != "adamw")', "settings.compile",
        (f"{OPTIMISER}what_cannot_be_had_is_refused_before_anything_is_loaded",),
    ),
    Bug(
        "an optimiser whose package is absent is refused", "it is not", "train/refusals.py",
        "    refuse_absent_optimizer(settings.optimizer)\n", "",
        (f"{OPTIMISER}what_cannot_be_had_is_refused_before_anything_is_loaded",),
    ),
    Bug(
        "every optimiser decays weights as AdamW", "the default of torch is taken", "train/optimizer.py",
        "return AdamW(parameters, lr=lr, weight_decay=weight_decay, ", "return AdamW(parameters, lr=lr, ",
        (f"{OPTIMISER}steps_are_those_of_adamw_as_it_is_written[adamw]",),
    ),
]  # fmt: skip

BUGS = {
    "LoRA files": LORA_FILES,
    "Nothing is lost": NOTHING_LOST,
    "Nothing goes wrong in silence": NOTHING_IN_SILENCE,
    "Compiled blocks, optimisers, FSDP2": DIFFERENT_KERNELS,
}
