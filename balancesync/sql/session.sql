-- The session that writes, as another connection sees it: whoever holds the lock that only it has.
-- A pid wouldn't do: a pooler gives the driver another one, and the system gives them again.

-- name: state
SELECT CASE
    -- Not to be seen by this role, or not kept track of. A session with a transaction, and so one
    -- with a statement under way, has a lock on its own number.
    WHEN coalesce(a.state, 'disabled') <> 'disabled' THEN a.state
    WHEN EXISTS (SELECT FROM pg_locks AS x WHERE x.locktype = 'virtualxid' AND x.pid = l.pid) THEN 'hidden'
    ELSE 'idle' END
FROM pg_locks AS l JOIN pg_stat_activity AS a ON a.pid = l.pid
WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND (l.classid::bigint << 32) | l.objid::bigint = $1;

-- name: end
SELECT pg_terminate_backend(l.pid)
FROM pg_locks AS l
WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND (l.classid::bigint << 32) | l.objid::bigint = $1;
