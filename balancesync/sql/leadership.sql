-- Who leads.

-- name: set_name
SELECT set_config('application_name', $1, false);

-- name: holder
SELECT substr(a.application_name, length('balancesync ') + 1)
FROM pg_locks AS l JOIN pg_stat_activity AS a ON a.pid = l.pid
WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND (l.classid::bigint << 32) | l.objid::bigint = $1;
