"""Images in buckets and on web servers: the same bytes as on disk, clear errors, nothing secret written down.

The bucket server is moto's, spoken to over real HTTP on loopback; web servers are the standard library's.
"""

import json
import logging
import pickle
import subprocess
import sys
import threading
import warnings
from datetime import timedelta

import numpy as np
import pytest
import servers
import yaozarrs
from observing import tree

import chunkrestore as cr
from chunkrestore.jobs.pyramids import build_pyramid as add_levels
from chunkrestore.jobs.run import resume
from chunkrestore.jobs.runner import BlockError
from chunkrestore.jobs.verify import verify
from chunkrestore.ome_zarr import (
    CorruptChunkError,
    build_pyramid,
    clean_partial,
    create_image,
    create_labels,
    open_image,
    open_writer,
    remote,
    store,
    write_image,
    write_labels,
)
from chunkrestore.operators.threshold import Threshold
from chunkrestore.psf import gaussian

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:botocore", "ignore::DeprecationWarning:moto"
)

SHAPE = (16, 12, 10)
WHOLE = tuple(slice(0, n) for n in SHAPE)
STORED = {
    "0.4": {"version": "0.4", "chunks": (8, 8, 8)},
    "0.5": {"version": "0.5", "chunks": (8, 8, 8)},
    "0.5 sharded": {"version": "0.5", "chunks": (4, 4, 4), "shards": (8, 8, 8)},
}


@pytest.fixture(scope="session")
def s3_server():
    """URL of an S3 server that keeps objects in memory."""
    pytest.importorskip("obstore")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from moto.server import ThreadedMotoServer
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def client(s3_server, monkeypatch):
    """An independent client of the server, which the environment names from now on."""
    import boto3

    for name in [name for name in remote.os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", servers.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", servers.SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    client = boto3.client("s3", region_name="us-east-1", endpoint_url=s3_server)
    yield client
    client.close()


@pytest.fixture
def bucket(client, request):
    """Name of a new bucket."""
    name = f"bucket-{abs(hash(request.node.name)):x}"
    client.create_bucket(Bucket=name)
    return name


@pytest.fixture
def proxy(s3_server, bucket, monkeypatch):
    """A proxy that the environment names as the server; a request is tried twice."""
    monkeypatch.setattr(remote, "RETRIES", {**remote.RETRIES, "max_retries": 1})
    proxy = servers.Proxy(s3_server)
    with servers.serving(proxy.handler()) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        yield proxy
        proxy.release.set()


def objects(client, bucket, prefix=""):
    """Return all objects below a prefix, by their names behind it."""
    found = {}
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for entry in page.get("Contents", ()):
            content = client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
            found[entry["Key"].removeprefix(prefix)] = content
    return found


def files(folder):
    """Return all files below a folder, by their names behind it."""
    return {f"/{p.relative_to(folder)}": p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def volume(dtype="uint16", seed=0):
    return np.random.default_rng(seed).integers(1, 250, SHAPE).astype(dtype)


def write(place, **options):
    options = {"axes": "zyx", "voxel_size": (2, 0.5, 0.5), "chunks": (8, 8, 8), "levels": 1} | options
    return write_image(volume(), place, **options)


@pytest.mark.parametrize("stored", STORED)
def test_a_bucket_gets_the_bytes_that_a_disk_gets(tmp_path, client, bucket, stored):
    local, url = tmp_path / "a.ome.zarr", f"s3://{bucket}/deep/er/a.ome.zarr"
    for place in (local, url):
        image = write(place, levels=2, **STORED[stored])
        options = {k: v for k, v in STORED[stored].items() if k != "version"}
        labels = write_labels((image.data > 120).astype("int32"), place, "nuclei", **options)
    assert image.path == url
    assert labels.path == f"{url}/labels/nuclei"
    assert open_image(url).labels == ("nuclei",)
    assert objects(client, bucket, "deep/er/a.ome.zarr") == files(local)
    assert set(objects(client, bucket)) == {f"deep/er/a.ome.zarr{key}" for key in files(local)}
    np.testing.assert_array_equal(image.data.compute(), volume())
    np.testing.assert_array_equal(labels.data.compute(), volume() > 120)
    yaozarrs.validate_zarr_store(local)


def test_a_url_is_opened_however_it_is_ended(client, bucket):
    write(f"s3://{bucket}/a.ome.zarr")
    assert open_image(f"s3://{bucket}/a.ome.zarr/").path == f"s3://{bucket}/a.ome.zarr"
    assert store.same(f"S3://{bucket}/a.ome.zarr/", f"s3://{bucket}/a.ome.zarr")


def test_an_image_at_the_root_of_a_bucket(client, bucket):
    image = write(f"s3://{bucket}")
    np.testing.assert_array_equal(image.data.compute(), volume())
    assert "zarr.json" in objects(client, bucket)


def test_overwriting_replaces_the_image_and_keeps_labels_and_neighbours(client, bucket):
    url = f"s3://{bucket}/a.ome.zarr"
    write(url, levels=2)
    write_labels(volume("int32"), url, "nuclei")
    client.put_object(Bucket=bucket, Key="a.ome.zarr2/0/zarr.json", Body=b"{}")
    with pytest.raises(FileExistsError, match=r"a\.ome\.zarr already holds an image"):
        write(url)
    with pytest.raises(ValueError, match="do not fit the new image"):
        write(url, overwrite=True)
    image = write_image(volume(seed=1), url, axes="zyx", chunks=(16, 16, 16), levels=2, overwrite=True)
    np.testing.assert_array_equal(image.data.compute(), volume(seed=1))
    assert image.labels == ("nuclei",)
    kept = objects(client, bucket)
    assert "a.ome.zarr2/0/zarr.json" in kept
    assert "a.ome.zarr/0/c/0/0/0" in kept
    assert "a.ome.zarr/0/c/1/1/1" not in kept


def test_labels_are_replaced_on_demand_and_others_stay(client, bucket):
    url = f"s3://{bucket}/a.ome.zarr"
    write(url)
    for name in ("nuclei", "nuclei 2"):
        write_labels(volume("int32"), url, name)
    with pytest.raises(FileExistsError, match="nuclei already holds labels"):
        write_labels(volume("int32"), url, "nuclei")
    write_labels(volume("int32", seed=1), url, "nuclei", overwrite=True)
    assert set(open_image(url).labels) == {"nuclei", "nuclei 2"}
    np.testing.assert_array_equal(open_image(f"{url}/labels/nuclei 2").data.compute(), volume())


def test_levels_are_added_and_replaced_in_a_bucket(tmp_path, client, bucket):
    local, url = tmp_path / "a.ome.zarr", f"s3://{bucket}/a.ome.zarr"
    for place in (local, url):
        write(place)
        write_labels(volume("int32"), place, "nuclei", chunks=(8, 8, 8))
        for options in ({"levels": 3}, {"levels": 2, "overwrite": True, "method": "mode"}):
            add_levels(place, **options, work_folder=tmp_path / "work", cluster="serial", quiet=True)
    assert [level.path for level in open_image(url).levels] == ["0", "3"]
    assert objects(client, bucket, "a.ome.zarr/") == tree(local)


def test_what_is_no_image_is_not_removed(client, bucket):
    client.put_object(Bucket=bucket, Key="folder/thesis.tex", Body=b"x")
    with pytest.raises(ValueError, match="is no OME-Zarr image; choose another store, it is not removed"):
        write(f"s3://{bucket}/folder", overwrite=True)
    with pytest.raises(ValueError, match="is not an OME-Zarr image; labels go into the group of an image"):
        write_labels(volume("int32"), f"s3://{bucket}/folder", "nuclei")
    assert objects(client, bucket) == {"folder/thesis.tex": b"x"}


def test_an_unfinished_image_is_no_image_until_another_process_publishes_it(client, bucket):
    url = f"s3://{bucket}/a.ome.zarr"
    writer = create_image(url, shape=SHAPE, dtype="uint16", axes="zyx", chunks=(8, 8, 8))
    writer.target().write(0, 0, WHOLE, volume())
    with pytest.raises(ValueError, match="is unfinished"):
        open_image(url)
    script = (
        "import sys; from chunkrestore.ome_zarr import build_pyramid, open_writer\n"
        "writer = open_writer(sys.argv[1]); build_pyramid(writer); writer.publish()"
    )
    subprocess.run([sys.executable, "-c", script, url], check=True)
    np.testing.assert_array_equal(open_image(url).data.compute(), volume())
    with pytest.raises(ValueError, match="is not unfinished"):
        open_writer(url)
    labels = create_labels(url, "nuclei")
    labels.target().write(0, 0, WHOLE, volume("int32"))
    again = open_writer(f"{url}/labels/nuclei")
    build_pyramid(again)
    again.publish()
    assert open_image(url).labels == ("nuclei",)


def test_a_handle_is_small_holds_no_secret_and_works_in_another_process(client, bucket, tmp_path):
    reader = write(f"s3://{bucket}/a.ome.zarr").source(0)
    reader.read(0, 0, WHOLE)
    pickled = pickle.dumps(reader)
    assert len(pickled) < 1000
    assert servers.SECRET.encode() not in pickled
    assert servers.KEY.encode() not in pickled
    (tmp_path / "handle").write_bytes(pickled)
    script = (
        "import pickle, sys; from pathlib import Path; import numpy as np\n"
        "reader = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        "np.save(sys.argv[2], reader.read(0, 0, tuple(slice(0, n) for n in reader.spatial_shape)))"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "handle"), str(tmp_path / "read.npy")], check=True
    )
    np.testing.assert_array_equal(np.load(tmp_path / "read.npy"), volume())


def test_nothing_secret_is_written_or_said(client, bucket, monkeypatch):
    url = f"s3://{bucket}/a.ome.zarr"
    image = write(url, provenance={"input": "x"})
    write_labels(volume("int32"), url, "nuclei")
    texts = [json.dumps(image.source(0).identity()), repr(image), repr(image.source(0))]
    texts += [v.decode() for k, v in objects(client, bucket).items() if k.endswith(".json")]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{servers.KEY}:{servers.SECRET}@127.0.0.1:9")
    monkeypatch.setattr(remote, "RETRIES", {"max_retries": 0})
    with pytest.raises(ConnectionError) as failed:
        open_image(url)
    texts.append(str(failed.value))
    with pytest.raises(ValueError, match="password") as failed:
        open_image(f"https://{servers.KEY}:{servers.SECRET}@host/a.ome.zarr")
    texts.append(str(failed.value))
    with pytest.raises(ValueError, match="query") as failed:
        open_image(f"https://host/a.ome.zarr?X-Amz-Signature={servers.SECRET}")
    texts.append(str(failed.value))
    assert not [t for t in texts if servers.SECRET in t or servers.KEY in t]


def test_a_public_bucket_is_read_unsigned_and_a_private_one_asks_for_credentials(client, bucket, monkeypatch):
    url = f"s3://{bucket}/a.ome.zarr"
    write(url)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(PermissionError, match=r"s3://.*refuses access.*set AWS_ACCESS_KEY_ID and AWS_SECRET"):
        open_image(url)
    for key in objects(client, bucket):
        client.put_object_acl(Bucket=bucket, Key=key, ACL="public-read")
    np.testing.assert_array_equal(open_image(url).data.compute(), volume())


def test_half_a_credential_is_named(client, bucket, monkeypatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(
        ValueError, match=r"cannot be opened with the AWS_ variables.*Missing SecretAccessKey"
    ):
        open_image(f"s3://{bucket}/a.ome.zarr")
    monkeypatch.setenv("AWS_CA_BUNDLE", "/nowhere.pem")
    with pytest.raises(ValueError, match=r"AWS_CA_BUNDLE '/nowhere\.pem' cannot be read"):
        open_image(f"s3://{bucket}/a.ome.zarr")


def test_what_is_missing_is_named_by_its_url(client, bucket, monkeypatch):
    with pytest.raises(FileNotFoundError, match=rf"s3://{bucket}/none\.zarr holds no zarr metadata"):
        open_image(f"s3://{bucket}/none.zarr")
    for call in (open_image, write):
        with pytest.raises(FileNotFoundError, match=r"s3://no-such-bucket/a\.zarr.* has no such bucket"):
            call("s3://no-such-bucket/a.zarr")
    monkeypatch.setattr(remote, "RETRIES", {"max_retries": 0})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for call in (open_image, write):
        with pytest.raises(ConnectionError, match=r"s3://.*127\.0\.0\.1:9 cannot be reached"):
            call(f"s3://{bucket}/a.zarr")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://bucket/a.zarr", "cannot be opened; use a path or a URL that begins with s3://"),
        ("file:///data/a.zarr", "cannot be opened; use a path"),
        ("s3:///a.zarr", "must name a bucket or server"),
        ("s3://bucket/a//b.zarr", "without empty"),
        ("s3://bucket/../b.zarr", "without empty"),
        ("https://host/a.zarr#0", "fragment"),
    ],
)
def test_urls_that_cannot_work_are_refused_before_anything_is_sent(url, message):
    for call in (open_image, write, lambda place: write_labels(volume("int32"), place)):
        with pytest.raises(ValueError, match=message):
            call(url)


def test_without_obstore_the_pip_line_is_given(monkeypatch):
    remote._client.cache_clear()
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(ImportError, match=r'pip install "chunkrestore\[s3\]"'):
        open_image("s3://bucket/a.ome.zarr")


def test_paths_and_urls_answer_the_same_questions(client, bucket, tmp_path):
    for root in (f"s3://{bucket}", str(tmp_path)):
        path = store.join(root, "x y", "a.ome.zarr")
        assert store.is_free(path)
        assert not store.exists(path)
        assert store.contents(path) is None
        write(path, levels=2)
        assert not store.is_free(path)
        assert store.exists(path)
        assert not store.is_file(path)
        assert store.is_file(store.join(path, "zarr.json"))
        assert not store.is_free(store.join(path, "zarr.json"))
        assert store.contents(path) == ["0", "1", "zarr.json"]
        assert store.parent(path) == store.join(root, "x y")
        assert store.name_of(path) == "a.ome.zarr"
        assert store.same(path, f"{path}/")
        assert not store.same(path, store.parent(path))
        assert store.enclosing_groups(store.join(path, "0")) == [path]
        assert clean_partial(path) == 0
        before = store.stamp(store.join(path, "0"))
        assert before == store.stamp(store.join(path, "0"))
        document = store.read_json(store.join(path, "0"), "zarr.json")
        store.write_json(store.join(path, "0"), "zarr.json", document | {"touched": True})
        assert store.stamp(store.join(path, "0")) != before
        client.put_object(Bucket=bucket, Key="x y/a.ome.zarr/1000/kept", Body=b"")
        store.remove_member(path, "1")
        assert "1" not in store.contents(path)
    assert store.contents(f"s3://{bucket}/x y/a.ome.zarr") == ["0", "1000", "zarr.json"]
    assert store.is_url(f"s3://{bucket}")
    assert not store.is_url(tmp_path)
    assert not store.same(f"s3://{bucket}", str(tmp_path))
    assert store.free_nbytes(f"s3://{bucket}/a") is None
    assert store.free_nbytes(str(tmp_path / "not" / "yet")) > 0


def test_consolidated_metadata_around_an_image_is_kept_up_to_date(client, bucket):
    import zarr

    url = f"s3://{bucket}/a.ome.zarr"
    write(url, version="0.4")
    zarr.consolidate_metadata(store.array_store(url), zarr_format=2)
    assert store.is_consolidated(url)
    write_labels(volume("int32"), url, "nuclei")
    group = zarr.open_consolidated(store.array_store(url), zarr_format=2)
    assert "0" in group["labels/nuclei"]


# ------------------------------------------------------------------------------------------- web servers


@pytest.mark.parametrize("stored", ["0.4", "0.5"])
def test_a_web_server_that_sends_files_is_enough(tmp_path, stored):
    image = write(tmp_path / "my data" / "a.ome.zarr", levels=2, **STORED[stored])
    write_labels(volume("int32"), image.path, "nuclei")
    with servers.files(tmp_path) as host:
        far = open_image(f"{host}/my%20data/a.ome.zarr")
        assert far.labels == ("nuclei",)
        assert far.voxel_size == image.voxel_size
        np.testing.assert_array_equal(far.data.compute(), volume())
        np.testing.assert_array_equal(
            far.source(1).read(0, 0, (slice(0, 5), slice(1, 6), slice(2, 5))),
            image.source(1).read(0, 0, (slice(0, 5), slice(1, 6), slice(2, 5))),
        )
        labels = open_image(f"{far.path}/labels/nuclei")
        np.testing.assert_array_equal(labels.data.compute(), volume())
        with pytest.raises(FileNotFoundError, match=r"http://127.*/none\.zarr holds no zarr metadata"):
            open_image(f"{host}/none.zarr")
        (tmp_path / "my data" / "a.ome.zarr" / "0" / ("0/0/0" if stored == "0.4" else "c/0/0/0")).unlink()
        assert not open_image(far.path).source(0).read(0, 0, (slice(0, 8),) * 3).any()


def test_shards_are_read_in_parts_or_the_server_is_blamed(tmp_path):
    write(tmp_path / "a.ome.zarr", **STORED["0.5 sharded"])
    part = (slice(3, 6), slice(4, 8), slice(0, 4))
    with servers.files(tmp_path, servers.FilesInParts) as host:
        far = open_image(f"{host}/a.ome.zarr")
        np.testing.assert_array_equal(far.data.compute(), volume())
        np.testing.assert_array_equal(far.source(0).read(0, 0, part), volume()[part])
    with servers.files(tmp_path) as host:
        far = open_image(f"{host}/a.ome.zarr")
        with pytest.raises(OSError, match=r"sends no parts of files, which sharded arrays need"):
            far.source(0).read(0, 0, part)


def test_web_servers_are_read_only(tmp_path):
    write(tmp_path / "a.ome.zarr")
    with servers.files(tmp_path) as host:
        for call in (
            lambda: write(f"{host}/b.ome.zarr"),
            lambda: write(f"{host}/a.ome.zarr", overwrite=True),
            lambda: write_labels(volume("int32"), f"{host}/a.ome.zarr"),
            lambda: store.is_free(f"{host}/b.ome.zarr"),
            lambda: store.write_json(f"{host}/b.ome.zarr", "zarr.json", {}),
            lambda: store.remove_keys(f"{host}/a.ome.zarr", ["zarr.json"]),
        ):
            with pytest.raises(ValueError, match=r"`output` http://127.* cannot be written"):
                call()


@pytest.mark.parametrize("stored", ["0.4", "0.5"])
def test_a_bucket_that_must_not_be_listed_is_read_but_a_refused_chunk_is_never_taken_for_empty(
    tmp_path, stored
):
    write(tmp_path / "a.ome.zarr", **STORED[stored])
    chunk = tmp_path / "a.ome.zarr" / "0" / ("0/0/0" if stored == "0.4" else "c/0/0/0")
    with servers.files(tmp_path, servers.FilesOfSecretiveBucket) as host:
        far = open_image(f"{host}/a.ome.zarr")
        assert far.labels == ()
        np.testing.assert_array_equal(far.data.compute(), volume())
        with pytest.raises(PermissionError, match=r"http://127.*refuses access \(403\)"):
            open_image(f"{host}/none.zarr")
        chunk.unlink()
        with pytest.raises(PermissionError, match=r"refuses access \(403\)"):
            far.source(0).read(0, 0, WHOLE)


# ------------------------------------------------------------------------------------------- faults


def is_chunk(line):
    return "/c/" in line


@pytest.mark.parametrize(
    ("fault", "error", "stored"),
    [
        ("drop", ConnectionError, "0.5"),
        ("truncate", ConnectionError, "0.5"),
        ("truncate", ConnectionError, "0.5 sharded"),
        ("stall", TimeoutError, "0.5"),
        (503, ConnectionError, "0.5 sharded"),
    ],
)
def test_a_fault_of_the_network_is_no_damage(proxy, bucket, monkeypatch, fault, error, stored):
    if fault == "stall":
        monkeypatch.setattr(remote, "_TIMEOUTS", {"read_timeout": timedelta(seconds=1)})
    options = {"shape": SHAPE, "dtype": "uint16", "axes": "zyx", "levels": 1, **STORED[stored]}
    target = create_image(f"s3://{bucket}/a.ome.zarr", **options).target()
    target.write(0, 0, WHOLE, volume())
    proxy.fault = lambda line: fault if is_chunk(line) else None
    with pytest.raises(error, match=rf"s3://{bucket}/a\.ome\.zarr/0/c/"):
        target.read(0, 0, WHOLE)
    if fault in ("drop", 503):
        with pytest.raises(error, match=rf"s3://{bucket}/a\.ome\.zarr/0/c/"):
            target.write(0, 0, WHOLE, volume(seed=1))
    proxy.fault = lambda line: None
    target.write(0, 0, WHOLE, volume(seed=2))
    np.testing.assert_array_equal(target.read(0, 0, WHOLE), volume(seed=2))


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (301, "the bucket lies in another region; set AWS_REGION"),
        (403, r"refuses access \(403\); check the credentials in the environment"),
        (418, "answers 418"),
    ],
)
def test_an_answer_that_will_not_change_is_no_transient_fault(proxy, bucket, status, message):
    proxy.fault = lambda line: status
    for call in (open_image, write):
        with pytest.raises(OSError, match=message) as refused:
            call(f"s3://{bucket}/a.ome.zarr")
        assert not isinstance(refused.value, ConnectionError | TimeoutError)


def test_a_fault_that_heals_is_not_noticed(proxy, bucket):
    image = write(f"s3://{bucket}/a.ome.zarr")
    seen = set()

    def once_each(line):
        first = is_chunk(line) and line not in seen
        seen.add(line)
        return ("drop", "truncate", 503)[len(seen) % 3] if first else None

    proxy.fault = once_each
    np.testing.assert_array_equal(image.source(0).read(0, 0, WHOLE), volume())
    assert len(seen) == 8


def test_faults_while_a_store_is_opened_or_published_are_transient(proxy, bucket):
    url = f"s3://{bucket}/a.ome.zarr"
    writer = create_image(url, shape=SHAPE, dtype="uint16", axes="zyx")
    writer.target().write(0, 0, WHOLE, volume())
    proxy.fault = lambda line: "drop" if "zarr.json" in line else None
    for call in (lambda: open_image(url), lambda: open_writer(url), writer.publish):
        with pytest.raises(ConnectionError, match=rf"{url}/zarr\.json"):
            call()
    proxy.fault = lambda line: None
    open_writer(url).publish()
    np.testing.assert_array_equal(open_image(url).data.compute(), volume())


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("damage", ["short", "garbage"])
def test_a_damaged_chunk_is_damage(client, bucket, stored, damage):
    image = write(f"s3://{bucket}/a.ome.zarr", **STORED[stored])
    key = f"a.ome.zarr/0/{'0/1/0' if stored == '0.4' else 'c/0/1/0'}"
    content = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    client.put_object(
        Bucket=bucket, Key=key, Body=content[:40] if damage == "short" else b"\xff" * len(content)
    )
    with pytest.raises(CorruptChunkError, match=r"s3://.*truncated or damaged"):
        image.source(0).read(0, 0, WHOLE)


def test_a_damaged_shard_is_replaced_without_being_read(proxy, client, bucket):
    url = f"s3://{bucket}/a.ome.zarr"
    target = create_image(
        url, shape=SHAPE, dtype="uint16", axes="zyx", levels=1, chunks=(4, 4, 4), shards=(8, 8, 8)
    ).target()
    target.write(0, 0, WHOLE, volume())
    client.put_object(Bucket=bucket, Key="a.ome.zarr/0/c/0/0/0", Body=b"damage")
    proxy.requests.clear()
    target.write(0, 0, WHOLE, volume(seed=1))
    chunks = [line for line in proxy.requests if "/c/" in line]
    assert {line.split()[0] for line in chunks} == {"PUT"}
    assert len(chunks) == 8
    np.testing.assert_array_equal(target.read(0, 0, WHOLE), volume(seed=1))


def test_a_write_that_failed_leaves_nothing_behind_that_could_arrive_later(proxy, bucket):
    options = {"shape": SHAPE, "dtype": "uint16", "axes": "zyx", "levels": 1, "chunks": (8, 8, 8)}
    target = create_image(f"s3://{bucket}/a.ome.zarr", **options).target()
    proxy.fault = lambda line: 403 if "/c/0/0/0" in line else "hold" if "/c/" in line else None
    timer = threading.Timer(0.5, proxy.release.set)
    timer.start()
    with pytest.raises(PermissionError):
        target.write(0, 0, WHOLE, volume())
    assert proxy.release.is_set()
    timer.join()
    proxy.requests.clear()
    proxy.fault = lambda line: None
    target.write(0, 0, WHOLE, volume(seed=1))
    assert sum("/c/" in line for line in proxy.requests) == 8
    np.testing.assert_array_equal(target.read(0, 0, WHOLE), volume(seed=1))


def test_a_certificate_of_ones_own_is_trusted_where_the_environment_names_it(
    s3_server, bucket, tmp_path, monkeypatch
):
    pytest.importorskip("cryptography")
    monkeypatch.setattr(remote, "RETRIES", {"max_retries": 0})
    certificate = servers.self_signed(tmp_path / "certificate.pem")
    with servers.serving(servers.Proxy(s3_server).handler(), certificate) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(
            OSError, match=r"certificate of 127\.0\.0\.1.* is not trusted; name one in AWS_CA_BUNDLE"
        ):
            open_image(f"s3://{bucket}/a.ome.zarr")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        np.testing.assert_array_equal(write(f"s3://{bucket}/a.ome.zarr").data.compute(), volume())


def test_the_chunks_of_a_block_travel_together(proxy, bucket):
    target = create_image(
        f"s3://{bucket}/a.ome.zarr", shape=SHAPE, dtype="uint16", axes="zyx", levels=1, chunks=(8, 8, 8)
    ).target()
    for work in (lambda: target.write(0, 0, WHOLE, volume()), lambda: target.read(0, 0, WHOLE)):
        proxy.crowd, proxy.n_together = 6, 0
        work()
        assert proxy.n_together >= 6


# ------------------------------------------------------------------------------------------- jobs


def scene(place):
    rng = np.random.default_rng(4)
    image = 20 + 100 * (rng.random((12, 32, 28)) > 0.98) + rng.normal(0, 2, (12, 32, 28))
    options = {"axes": "zyx", "voxel_size": (1, 0.5, 0.5), "chunks": (8, 8, 8), "levels": 2}
    return write_image(image.astype("uint16"), f"{place}/in.ome.zarr", **options)


def deconvolved(place, **options):
    lucy = cr.RichardsonLucy(gaussian((0.8, 1.0, 1.0), truncate=2), iterations=2)
    options = {"block_shape": (12, 16, 16), "cluster": "serial", "quiet": True} | options
    return cr.run(lucy, f"{place}/in.ome.zarr", f"{place}/out.ome.zarr", **options)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """What the job makes of the scene in a folder: the files of the output."""
    folder = tmp_path_factory.mktemp("disk")
    scene(folder)
    deconvolved(folder)
    return files(folder / "out.ome.zarr")


def check_against(on_disk, client, bucket):
    """Compare an output in a bucket with files, but for the group's document, which names the input."""
    found, expected = objects(client, bucket, "out.ome.zarr"), dict(on_disk)
    here, there = (json.loads(kind.pop("/zarr.json"))["attributes"]["ome"] for kind in (found, expected))
    assert here == there
    assert found == expected


def test_a_job_between_buckets_gives_the_bytes_of_one_on_disk(client, bucket, tmp_path, monkeypatch, on_disk):
    monkeypatch.chdir(tmp_path)
    scene(f"s3://{bucket}")
    report = deconvolved(f"s3://{bucket}")
    assert report.outputs == [f"s3://{bucket}/out.ome.zarr"]
    check_against(on_disk, client, bucket)
    (checked,) = verify(f"s3://{bucket}/out.ome.zarr", cluster="serial", quiet=True)
    assert checked.n_blocks > 0
    assert not checked.problems
    assert (tmp_path / f"{bucket}-out.ome.zarr.chunkrestore" / "image" / "report.json").is_file()
    written = b"".join(files(tmp_path).values())
    assert servers.SECRET.encode() not in written
    assert servers.KEY.encode() not in written
    with pytest.raises(FileExistsError, match=r"`output` s3://.* exists"):
        deconvolved(f"s3://{bucket}", work_folder=tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"`output` https://host/out\.zarr cannot be written"):
        cr.run(Threshold(), f"s3://{bucket}/in.ome.zarr", "https://host/out.zarr", cluster="serial")


def test_a_job_reads_its_input_from_a_web_server(tmp_path, on_disk):
    scene(tmp_path / "far")
    with servers.files(tmp_path / "far") as host:
        lucy = cr.RichardsonLucy(gaussian((0.8, 1.0, 1.0), truncate=2), iterations=2)
        options = {"block_shape": (12, 16, 16), "cluster": "serial", "quiet": True}
        cr.run(lucy, f"{host}/in.ome.zarr", tmp_path / "out.ome.zarr", **options)
    made = files(tmp_path / "out.ome.zarr")
    assert {k: v for k, v in made.items() if k != "/zarr.json"} == {
        k: v for k, v in on_disk.items() if k != "/zarr.json"
    }


@pytest.mark.slow
def test_workers_of_a_cluster_read_and_write_buckets(client, bucket, tmp_path, on_disk):
    scene(f"s3://{bucket}")
    deconvolved(f"s3://{bucket}", cluster="local", n_workers=2, work_folder=tmp_path / "work")
    check_against(on_disk, client, bucket)


def test_labels_are_made_beside_an_image_in_a_bucket(client, bucket, tmp_path):
    for place in (f"s3://{bucket}", tmp_path / "disk"):
        image = scene(place)
        options = {
            "block_shape": (12, 16, 16),
            "cluster": "serial",
            "quiet": True,
            "work_folder": tmp_path / "w",
        }
        cr.run(Threshold(), image, image.path, label_name="cells", overwrite=True, **options)
    made = open_image(f"s3://{bucket}/in.ome.zarr/labels/cells").data.compute()
    np.testing.assert_array_equal(
        made, open_image(tmp_path / "disk" / "in.ome.zarr" / "labels" / "cells").data
    )
    assert made.max() > 10


def test_a_job_whose_bucket_fails_goes_on_later_without_doing_blocks_again(
    proxy, client, bucket, tmp_path, on_disk
):
    scene(f"s3://{bucket}")
    written = []

    def refuse_after_some(line):
        is_result = line.startswith("PUT") and "/out.ome.zarr/0/c/" in line
        written.extend([line] if is_result else [])
        return 403 if is_result and len(written) > 2 else None

    proxy.fault = refuse_after_some
    with pytest.raises(BlockError, match="refuses access"):
        deconvolved(f"s3://{bucket}", work_folder=tmp_path)
    with pytest.raises(ValueError, match="is unfinished"):
        open_image(f"s3://{bucket}/out.ome.zarr")
    proxy.fault = lambda line: None
    proxy.requests.clear()
    resume(f"s3://{bucket}/out.ome.zarr", work_folder=tmp_path, cluster="serial", quiet=True)
    again = [line for line in proxy.requests if line.startswith("PUT") and "/out.ome.zarr/0/c/" in line]
    assert 0 < len(again) < len([key for key in on_disk if key.startswith("/0/c/")])
    check_against(on_disk, client, bucket)


@pytest.mark.slow
def test_a_job_sits_out_a_fault_that_lasts_longer_than_a_request(proxy, client, bucket, tmp_path, on_disk):
    scene(f"s3://{bucket}")
    n_dropped = 0

    def drop_some(line):
        nonlocal n_dropped
        hit = "/out.ome.zarr/0/c/" in line and n_dropped < 2
        n_dropped += hit
        return "drop" if hit else None

    proxy.fault = drop_some
    deconvolved(f"s3://{bucket}", work_folder=tmp_path)
    assert n_dropped == 2
    check_against(on_disk, client, bucket)
    events = [json.loads(line) for line in (tmp_path / "image" / "events.jsonl").read_text().splitlines()]
    retries = [event for event in events if event["event"] == "retry"]
    assert {event["cause"] for event in retries} == {"transient"}
