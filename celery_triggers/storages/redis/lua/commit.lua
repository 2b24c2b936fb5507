-- Apply a commit whole if the version still holds, else answer with a fresh slice.
--
-- KEYS[5]  string  the configuration with this digest
-- KEYS[6]  hash    gates that wait: <uid length>:<uid><instance>, by task id
-- ARGV[2]  JSON: {expected version, version and incarnation, head, {entry: value}, [drops],
--          [[instance, expected rev, row]], [waits added], [waits removed],
--          passing text or '', its seconds, configuration or '', <uid length>:<uid>,
--          {instance or '': due date}, {task id: instance that waits at a gate, or ''}}

local commit = cjson.decode(ARGV[2])
local version = string.match(redis.call('HGET', KEYS[1], 'v') or '', ' (.*)$') or ''

if version ~= commit[1] then return slice(cjson.decode(ARGV[1])) end
for _, row in ipairs(commit[6]) do
  local known = redis.call('HGET', KEYS[1], 'i:' .. row[1])
  local rev = known and string.match(known, '^(%d+)|') or '0'
  if rev ~= row[2] then return slice(cjson.decode(ARGV[1])) end
end

redis.call('HSET', KEYS[1], 'v', commit[2], 'm', commit[3])
for _, entry in ipairs(commit[5]) do redis.call('HDEL', KEYS[1], entry) end
for key, value in pairs(commit[4]) do redis.call('HSET', KEYS[1], key, value) end
for _, row in ipairs(commit[6]) do redis.call('HSET', KEYS[1], 'i:' .. row[1], row[3]) end
for _, member in ipairs(commit[8]) do redis.call('ZREM', KEYS[2], member) end
for _, member in ipairs(commit[7]) do redis.call('ZADD', KEYS[2], 0, member) end
if commit[9] ~= '' then redis.call('SET', KEYS[3], commit[9], 'EX', commit[10]) end
if commit[11] ~= '' then redis.call('SETNX', KEYS[5], commit[11]) end
for name, at in pairs(commit[13]) do set_due(KEYS[4], commit[12], name, at) end
for id, name in pairs(commit[14]) do
  if name ~= '' then
    redis.call('HSET', KEYS[6], id, commit[12] .. name)
  else
    redis.call('HDEL', KEYS[6], id)
  end
end
return false
