-- Take what is due in one shard, moving each date first.
--
-- KEYS[1]  the due dates
-- KEYS[2]  string  '<when this was last done> <until when nothing is calm>'
-- ARGV[1]  how many to take at most
-- ARGV[2]  by how many milliseconds to move them
-- ARGV[3]  after how many milliseconds without anybody asking it is not calm
--
-- Returns {time, [member, date, ...], 1 if it is calm, 1 if there may be more, next date or ''}.

local now, gap = now_ms(), tonumber(ARGV[3])
local last, restless = string.match(redis.call('GET', KEYS[2]) or '', '^(%d+) (%d+)$')
last, restless = tonumber(last), tonumber(restless) or 0
if not last or now - last > gap then restless = now + gap end
-- A clock that was ahead for a while must not leave it restless for as long.
restless = math.min(restless, now + gap)
-- A server that is full refuses what could need memory only until a script has written, so what
-- frees some comes first: sweeps are what ends sessions. (Redis 6.2 knows no flags of scripts.)
redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[2], string.format('%d %d', now, restless))

local limit = tonumber(ARGV[1])
local found = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'WITHSCORES', 'LIMIT', 0, limit)
for index = 1, #found, 2 do redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), found[index]) end
local following = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
return {
  string.format('%d', now), found, now >= restless and 1 or 0,
  #found >= 2 * limit and 1 or 0, following[2] or '',
}
